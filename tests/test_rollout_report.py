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


def without(rollouts: Rollouts, *names: str) -> Rollouts:
    """Numbers of tokens that were not measured are not there."""
    for name in names:
        del rollouts.tokens[name]
    return rollouts


def test_means_are_over_the_completions_that_have_a_reward() -> None:
    rollouts = rollouts_of([(1, 2), (1, 1), (1, 3), (1, 2)])
    for name, values in {
        "reward": [1.0, math.nan, 4.0, 4.0],
        # A part has a score where the whole has none, and none for rows that it is not for.
        "rewards.told": [math.nan, 7.0, 1.0, math.nan],
        "rewards.none": [math.nan] * 4,
    }.items():
        rollouts.each[name] = torch.tensor(values, dtype=torch.float64)
    found = rollout_metrics(without(rollouts, "ids"))
    assert found == pytest.approx(
        {"reward": 3.0, "rewards.told": 4.0, "reward_std": math.sqrt(3), "length": 2.0, "truncated": 0.5}
    )


def test_one_reward_has_no_deviation_and_none_no_mean() -> None:
    rollouts = rollouts_of([(1, 2), (1, 1)])
    rollouts.each["reward"] = torch.tensor([math.nan, 5.0], dtype=torch.float64)
    assert rollout_metrics(rollouts) == {"reward": 5.0, "reward_std": 0.0, "length": 1.5, "truncated": 0.5}
    rollouts.each["reward"][1] = math.nan
    found = rollout_metrics(rollouts)
    assert "reward" not in found
    assert not any(math.isnan(value) for value in found.values())


def test_without_a_reference_there_is_no_kl(told: Rollouts) -> None:
    without(told, "ref_logp")
    assert "kl" not in rollout_metrics(told)
    assert rollout_metrics(told)["entropy"] == 3.0
    assert [row["kl"] for row in rollout_records(told, 5)] == [None, None]
    without(told, "logp", "entropy")
    assert {"kl", "entropy"}.isdisjoint(rollout_metrics(told))
    assert [row["advantage"] for row in rollout_records(told, 5)] == [1.0, 7.0]


def test_a_record_without_a_reward_says_null(told: Rollouts) -> None:
    told.each["reward"][0] = math.nan
    told.each["rewards.model"][1] = math.nan
    first, second = rollout_records(told, 5)
    assert (first["reward"], first["rewards.model"], first["kl"], first["advantage"]) == (None, 2.0, 1.5, 1.0)
    assert (second["reward"], second["rewards.model"]) == (4.0, None)
