"""Best of n: of a prompt's completions those that a mixed reward rates highest (Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from stages.rewards.mix import Mixed
from stages.rollouts.sample import Placed


def best_of(records: Sequence[Placed], mixed: Sequence[Mixed], keys: Sequence[str], keep: int) -> tuple[list[Placed], int]:
    """The `keep` best samples of each prompt, in order, with `reward` and, by `keys`, `rewards.*`, and how many have no
    reward. Those are never kept; of equal ones the earlier is.
    """
    rated: list[Placed] = [
        (place, {**record, "reward": one.total, **{f"rewards.{key}": one.parts.get(key) for key in keys}})
        for (place, record), one in zip(records, mixed, strict=True)
        if one.total is not None
    ]
    kept: list[Placed] = []
    for _, group in groupby(rated, key=lambda pair: pair[0]):
        best = sorted(group, key=lambda pair: -pair[1]["reward"])[:keep]
        kept += sorted(best, key=lambda pair: pair[1]["sample"])
    return kept, len(records) - len(rated)
