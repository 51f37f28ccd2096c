"""An annotator who sees the scores of samples through noise, and does not tell apart what is near or equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.data.recorded import sample_number
from stages.rewards.base import Score, verdict
from stages.rollouts.seeds import sample_seed, uniforms
from stages.specs.label import LabelConfig

Row = dict[str, Any]
Scored = tuple[Row, Score | None]


class Judged(NamedTuple):
    """A sample with a score, its value, and that as the annotator sees it."""

    row: Row
    score: Score
    value: float
    seen: float


def judged(group: Sequence[Scored], config: LabelConfig, counts: Counter[str]) -> list[Judged]:
    """A prompt's samples that have a score, the best seen first; the others are counted."""
    kept = [
        Judged(row, one, value, _seen(config, row, place, value))
        for place, (row, one) in enumerate(group)
        if one is not None and (value := verdict(one)) is not None
    ]
    counts["samples without a score"] += len(group) - len(kept)
    return sorted(kept, key=lambda one: -one.seen)


def tied(config: LabelConfig, one: Judged, other: Judged) -> bool:
    """Whether the annotator does not tell two samples apart."""
    return abs(one.value - other.value) <= config.tie_within or one.row["completion"] == other.row["completion"]


def _seen(config: LabelConfig, row: Row, place: int, value: float) -> float:
    """The score with the annotator's noise, from the sample's own seed."""
    if config.noise == 0:
        return value
    # A name apart from the sampler's: the same number must not decide a completion and its label.
    seed = sample_seed(config.seed, int(row.get("step") or 0), f"label/{row['id']}", sample_number(row, place))
    uniform = max(float(uniforms(np.array([seed], np.uint64), 1)[0, 0]), 2.0**-54)
    return value - config.noise * math.log(-math.log(uniform))
