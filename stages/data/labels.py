"""What `label` writes beside the columns of its samples: their types."""

from __future__ import annotations

import pyarrow as pa

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
