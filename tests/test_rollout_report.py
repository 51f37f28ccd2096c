"""What is said of a step's completions: numbers for the log, rows for the dataset, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from test_rollouts import rollouts_of

from stages.rollouts.batch import Rollouts
from stages.rollouts.report import rollout_metrics, rollout_records


@pytest.fixture
def told() -> Rollouts:
    rollouts = rollouts_of([(2, 3), (1, 1)])
    rollouts.tokens["logp"] = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    rollouts.tokens["ref_logp"] = torch.tensor([-1.5, -1.0, -5.0, -0.25])
    rollouts.tokens["entropy"] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    rollouts.tokens["advantages"] = torch.tensor([3.0, -1.0, 1.0, 7.0])
    rollouts.each = {
        name: torch.tensor(values).double() for name, values in {"reward": [1.0, 4.0], "rewards.model": [2.0, 4.0]}.items()
    }
    return rollouts


def test_metrics_are_means_over_completions(told: Rollouts) -> None:
    assert rollout_metrics(told) == pytest.approx(
        {
            "reward": 2.5,
            "rewards.model": 3.0,
            "reward_std": math.sqrt(4.5),
            "kl": (1.5 - 0.25) / 2,
            "entropy": 3.0,
            "length": 2.0,
            "truncated": 0.5,
        }
    )


def test_a_record_has_the_columns_of_a_rollout(told: Rollouts) -> None:
    told.samples[1].row.update({"reward": 9.0, "step": 77, "note": "kept"})
    assert rollout_records(told, 5) == [
        {
            "id": "row 0",
            "step": 5,
            "sample": 0,
            "completion": "text 0",
            "length": 3,
            "finish": "length",
            "policy": "policy",
            "reward": 1.0,
            "rewards.model": 2.0,
            "kl": 1.5,
            "advantage": 1.0,
        },
        {
            "id": "row 1",
            "reward": 4.0,
            "note": "kept",
            "step": 5,
            "sample": 0,
            "completion": "text 1",
            "length": 1,
            "finish": "stop",
            "policy": "policy",
            "rewards.model": 4.0,
            "kl": -0.25,
            "advantage": 7.0,
        },
    ]
