"""What is said of a step's completions: numbers for the log, rows for the rollouts dataset."""

from __future__ import annotations

import torch

from stages.objectives.value import explained_variance
from stages.rollouts.batch import Rollouts
from stages.rollouts.sample import Row


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over completions: `reward` in all and `rewards.*` by component, `kl` to the reference in nats a completion, lengths
    in tokens, the share truncated; `entropy` in nats a token."""
    kl_B = rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
    parts = {name: float(part_B.mean()) for name, part_B in rollouts.each.items()}
    return parts | {
        "reward_std": float(rollouts.each["reward"].std()),
        "kl": float(kl_B.mean()),
        "entropy": float(rollouts.tokens["entropy"].mean()),
        "length": float(rollouts.lengths_B.mean()),
        "truncated": float(rollouts.truncated_B.mean()),
    }


def critic_metrics(rollouts: Rollouts) -> dict[str, float]:
    """How well the critic foresaw the returns, before it is updated."""
    values_N, returns_N = rollouts.tokens["values"], rollouts.tokens["returns"]
    known = explained_variance(values_N, returns_N, torch.ones_like(values_N))
    return {"explained_variance": float(known), "value": float(values_N.mean()), "return": float(returns_N.mean())}


def rollout_records(rollouts: Rollouts, step: int) -> list[Row]:
    """One row a completion, in DESIGN's columns; the advantage is its tokens' mean."""
    kl_B = rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
    advantage_B = rollouts.sums_B(rollouts.tokens["advantages"]) / rollouts.lengths_B
    columns = {name: part_B.tolist() for name, part_B in rollouts.each.items()}
    columns |= {"kl": kl_B.tolist(), "advantage": advantage_B.tolist()}
    return [
        sample.record(step, "policy") | {name: values[place] for name, values in columns.items()}
        for place, sample in enumerate(rollouts.samples)
    ]
