"""What `label` writes beside the columns of its samples: their types, and the segments of a pair's completions."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from stages.data.schemas import SEGMENTS, scored_segments
from stages.rewards.base import Score
from stages.specs.label import LabelConfig

Row = dict[str, Any]
TYPES: dict[str, dict[str, pa.DataType]] = {
    "pairs": {
        **{name: pa.string() for name in ("id", "chosen", "rejected", "chosen_finish", "rejected_finish")},
        **{name: pa.float64() for name in ("margin", "chosen_score", "rejected_score")},
    },
    "rankings": {
        **{name: pa.list_(pa.string()) for name in ("completions", "finishes")},
        "ranks": pa.list_(pa.int64()),
        "scores": pa.list_(pa.float64()),
    },
    "steps": {"completions": pa.list_(pa.string()), "labels": pa.list_(pa.float64()), "finish": pa.string()},
}
SEGMENT_TYPES = {name: pa.list_(pa.int64() if name.endswith("_ends") else pa.float64()) for name in SEGMENTS}


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
