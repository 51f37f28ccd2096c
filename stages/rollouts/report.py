"""What is said of a step's completions: numbers for the log, rows for the rollouts dataset."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stages.objectives.value import explained_variance
from stages.rollouts.batch import Rollouts
from stages.rollouts.sample import Row


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over completions: `reward` in all and `rewards.*` by component, of those that have one; where they are measured,
    `kl` to the reference in nats a completion and `entropy` in nats a token; lengths in tokens; the share truncated. And
    `notes.REWARD.REASON`: the completions whose verdict was noted with this reason, where there are any."""
    known = {name: part_B[~part_B.isnan()] for name, part_B in rollouts.each.items()}
    found = {name: float(part_B.mean()) for name, part_B in known.items() if len(part_B)}
    if len(known["reward"]):
        found["reward_std"] = float(known["reward"].std()) if len(known["reward"]) > 1 else 0.0
    if (kl_B := _drift(rollouts)) is not None:
        found["kl"] = float(kl_B.mean())
    if "entropy" in rollouts.tokens:
        found["entropy"] = float(rollouts.tokens["entropy"].mean())
    reasons = Counter((key, note.partition(":")[0]) for notes in rollouts.notes for key, note in notes.items())
    found |= {f"notes.{key}.{'_'.join(reason.split())}": float(count) for (key, reason), count in sorted(reasons.items())}
    return found | {"length": float(rollouts.lengths_B.mean()), "truncated": float(rollouts.truncated_B.mean())}


def critic_metrics(rollouts: Rollouts) -> dict[str, float]:
    """How well the critic foresaw the returns, before it is updated."""
    values_N, returns_N = rollouts.tokens["values"], rollouts.tokens["returns"]
    known = explained_variance(values_N, returns_N, torch.ones_like(values_N))
    return {"explained_variance": float(known), "value": float(values_N.mean()), "return": float(returns_N.mean())}


def rollout_records(rollouts: Rollouts, step: int) -> list[Row]:
    """One row a completion, in DESIGN's columns; the advantage is its tokens' mean. Null: no reward, or not measured."""
    kl_B = _drift(rollouts)
    advantage_B = rollouts.sums_B(rollouts.tokens["advantages"]) / rollouts.lengths_B
    columns: dict[str, list[Any]] = {
        name: [None if math.isnan(one) else one for one in part_B.tolist()] for name, part_B in rollouts.each.items()
    }
    columns |= {"kl": [None] * len(rollouts) if kl_B is None else kl_B.tolist(), "advantage": advantage_B.tolist()}
    if rollouts.notes:
        columns["notes"] = ["; ".join(f"{key}: {note}" for key, note in of.items()) or None for of in rollouts.notes]
    return [
        sample.record(step, "policy") | {name: values[place] for name, values in columns.items()}
        for place, sample in enumerate(rollouts.samples)
    ]


def record_types(rewards: Iterable[str]) -> dict[str, pa.DataType]:
    """The types of the columns that may be null for long: a part of the reward for rows that come late, a KL not measured."""
    return dict.fromkeys(("reward", *(f"rewards.{name}" for name in rewards), "kl", "advantage"), pa.float64())


def _drift(rollouts: Rollouts) -> np.ndarray | None:
    """kl_B to the reference, k1, where both log-probs are known."""
    if "ref_logp" not in rollouts.tokens:
        return None
    return rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
