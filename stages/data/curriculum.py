"""Which prompts a loop uses, and in which order, by a column of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stages.errors import InputError
from stages.run import Run
from stages.specs.grpo import Curriculum

Row = dict[str, Any]


def in_curriculum(run: Run, rows: Sequence[Row], curriculum: Curriculum) -> list[Row]:
    """The rows whose number lies within the curriculum's bounds, in its order; rows without a number are left out. Counts both.

    Raises InputError when the column is missing or none of its numbers is within the bounds.
    """
    column = curriculum.column
    if column not in rows[0]:
        raise InputError(
            f"the curriculum is by the column {column!r}, which the prompts do not have (they have {', '.join(rows[0])})"
        )
    low = -math.inf if curriculum.minimum is None else curriculum.minimum
    high = math.inf if curriculum.maximum is None else curriculum.maximum
    known = [row for row in rows if isinstance(row[column], int | float) and not math.isnan(row[column])]
    kept = [row for row in known if low <= row[column] <= high]
    if not kept:
        raise InputError(f"no prompt's {column} is within {low} and {high}: the {len(known)} that have one lie elsewhere")
    without = {"used": len(kept), f"left out: {column} out of bounds": len(known) - len(kept)}
    without[f"left out: no {column}"] = len(rows) - len(known)
    run.table("curriculum", [{"what": what, "rows": count} for what, count in without.items()])
    if curriculum.order == "shuffled":
        return kept
    return sorted(kept, key=lambda row: row[column], reverse=curriculum.order == "falling")
