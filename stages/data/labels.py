"""What labelling by a reward and labelling by people share: what of a sample is shown, the preference's
row and its segments, the split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import digest_of
from stages.data.parquet import RowWriter, read_schema
from stages.data.recorded import of_one_sample
from stages.data.schemas import SEGMENTS, row_id, scored_segments
from stages.errors import InputError
from stages.rewards.base import Score
from stages.rewards.text import as_shown
from stages.run import Run
from stages.specs.label import LabelConfig

Row = dict[str, Any]
PAIR_TYPES: dict[str, pa.DataType] = {
    **{name: pa.string() for name in ("id", "chosen", "rejected", "chosen_finish", "rejected_finish")},
    **{name: pa.float64() for name in ("margin", "chosen_score", "rejected_score")},
}

TYPES: dict[str, dict[str, pa.DataType]] = {
    "pairs": PAIR_TYPES,
    "rankings": {
        **{name: pa.list_(pa.string()) for name in ("completions", "finishes")},
        "ranks": pa.list_(pa.int64()),
        "scores": pa.list_(pa.float64()),
    },
    "steps": {"completions": pa.list_(pa.string()), "labels": pa.list_(pa.float64()), "finish": pa.string()},
}
SEGMENT_TYPES = {name: pa.list_(pa.int64() if name.endswith("_ends") else pa.float64()) for name in SEGMENTS}

# Beside the prompt, what a question of people has: the two texts as they are shown, and of which samples they are.
QUESTION_TYPES: dict[str, pa.DataType] = {
    **{name: pa.string() for name in ("id", "left", "right", "left_finish", "right_finish")},
    **{name: pa.int64() for name in ("left_sample", "right_sample")},
}


def completion_columns(folder: Path, what: str) -> list[str]:
    """The columns of a dataset with completions. Raises InputError when it has none."""
    columns = read_schema(folder).names
    if "completion" not in columns:
        raise InputError(f'the {what} have no column "completion" (they have {", ".join(columns)})')
    return columns


def answers_alone(rows: Iterable[Row], counts: Counter[str]) -> Iterator[Row]:
    """The samples as a reader is shown them, who does not see the thinking."""
    for row in rows:
        text, finish = as_shown(row["completion"], row.get("finish"))
        if text:
            yield row | {"completion": text, "finish": finish}
        else:
            counts["samples without an answer to show"] += 1


def of_prompt(source: Row, taken: Iterable[str]) -> Row:
    """The columns of a sample that are its prompt's, but for those that what is made of it has itself."""
    hidden = {"id", *taken}
    return {name: value for name, value in source.items() if not of_one_sample(name) and name not in hidden}


def preference_row(source: Row, preference: Row) -> Row:
    """A canonical row: the preference, and the columns of the prompt that are not of one sample."""
    return {"id": row_id(preference), **preference, **of_prompt(source, preference)}


def write_split(
    run: Run, rows: Iterable[Row], heldout_share: float, types: Mapping[str, pa.DataType], what: str
) -> dict[str, int]:
    """Write rows as the outputs `train` and `heldout`; how many each holds. Raises InputError when all are held out."""
    train, heldout = (RowWriter(run.output(name), types=types) for name in ("train", "heldout"))
    for row in rows:
        (heldout if held_out(heldout_share, row) else train).add(row)
    made = {"rows_train": train.close(), "rows_heldout": heldout.close()}
    if made["rows_heldout"] and not made["rows_train"]:
        raise InputError(f"all {made['rows_heldout']} {what}s were held out: lower heldout, or sample more prompts")
    return made


def held_out(share: float, row: Row) -> bool:
    """By a hash of its own, apart from that of `prepare`, which has split these prompts once already."""
    return int(digest_of(["label", row["prompt"]])[:12], 16) < share * 16**12


def types_of(config: LabelConfig) -> dict[str, pa.DataType]:
    """The columns of the form that is asked for."""
    return TYPES[config.form] | (SEGMENT_TYPES if config.segments else {})


def segment_columns(pair: Row, chosen: Score, rejected: Score, where: str) -> Row:
    """The columns `SEGMENTS` of a pair, from the steps that a reward rates of its completions. What follows the last rated step
    belongs to it. All are null where a completion has no rated step or no text: 2D-DPO learns from both or from neither.

    Raises InputError for steps that cannot be segments."""
    found: Row = dict.fromkeys(SEGMENTS)
    for name, score in (("chosen", chosen), ("rejected", rejected)):
        text, ends, scores = pair[name], score.step_ends, score.step_scores
        if not text or not scores or ends is None:
            return dict.fromkeys(SEGMENTS)
        found |= {f"{name}_ends": [*ends[:-1], len(text) - 1], f"{name}_scores": list(scores)}
    return scored_segments(pair | found, where)
