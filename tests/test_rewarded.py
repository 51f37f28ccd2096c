"""Rewards of a step's completions on one process or many, and what their length takes off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collect import on_ranks
from test_rollouts import rollouts_of

from stages.rewards import REWARDS
from stages.rewards.base import RewardEntry, Row, Score
from stages.rewards.mix import Mixed, Mixture
from stages.rollouts import rewarded
from stages.rollouts.batch import Rollouts
from stages.rollouts.engine import Completion
from stages.rollouts.rewarded import give_rewards, punish_length
from stages.rollouts.sample import Sample
from stages.specs.base import Runtime
from stages.specs.common import WeightedReward
from stages.specs.grpo import Truncation
from stages.training.setup import accelerator_for

NAN = math.nan
CPU = Runtime(device="cpu", threads=1)
ASKED: list[tuple[list[str], list[Row], bool]] = []


def told(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """The number after a completion's words, an end of a step at its first character; none for every fifth."""
    ASKED.append((list(completions), list(rows), torch.is_autocast_enabled("cpu")))
    numbers = [int(text.split()[1]) for text in completions]
    return [
        None if n % 5 == 4 else Score(float(n), {}, [1.0, n - 1.0], [0, len(text) - 1])
        for n, text in zip(numbers, completions, strict=True)
    ]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    ASKED.clear()
    monkeypatch.setitem(REWARDS, "told", RewardEntry(f"{__name__}:told", version=1))


def mixture_of() -> Mixture:
    """Two parts, one of them for rows of one kind."""
    return Mixture(
        [WeightedReward(name="told"), WeightedReward(name="length", weight=2.0, where={"kind": "long"}, label="brief")]
    )


def seven() -> Rollouts:
    rollouts = rollouts_of([(2, 3), (1, 1), (3, 2), (1, 1), (1, 2), (2, 2), (1, 4)])
    for place, sample in enumerate(rollouts.samples):
        sample.row["kind"] = "long" if place % 3 == 0 else "short"
    return rollouts


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_process_ends_with_all_rewards_in_order(processes: int) -> None:
    """`text N` has six characters, each -0.001 to a part of weight 2."""
    expected = [0 - 0.012, 1.0, 2.0, 3 - 0.012, NAN, 5.0, 6 - 0.012]

    def give(accelerator: Any) -> tuple[Rollouts, list[Mixed]]:
        rollouts = seven()
        return rollouts, give_rewards(accelerator, mixture_of().begin(), rollouts)

    for rollouts, verdicts in on_ranks(processes, give, rewarded):
        assert list(rollouts.each) == ["reward", "rewards.told", "rewards.brief"]
        assert {values.dtype for values in rollouts.each.values()} == {torch.float64}
        assert rollouts.each["reward"].tolist() == pytest.approx(expected, nan_ok=True)
        assert rollouts.each["rewards.told"].tolist() == pytest.approx([0, 1, 2, 3, NAN, 5, 6], nan_ok=True)
        brief = [-0.006 if place % 3 == 0 else NAN for place in range(7)]
        assert rollouts.each["rewards.brief"].tolist() == pytest.approx(brief, nan_ok=True)
        assert [one.total for one in verdicts] == [None if math.isnan(one) else pytest.approx(one) for one in expected]
        assert [one.steps for one in verdicts[1:5]] == [
            [(0, 1.0), (5, 0.0)],
            [(0, 1.0), (5, 1.0)],
            [(0, 1.0), (5, -0.012), (5, 2.0)],
            [],
        ]
        assert rollouts.steps == [one.steps for one in verdicts]
        assert [sorted(one.parts) for one in verdicts] == [["brief", "told"] if n % 3 == 0 else ["told"] for n in range(7)]
    # Nothing is rated twice, and every completion with its own row, which says how it ended.
    assert sorted(text for texts, _, _ in ASKED for text in texts) == [f"text {n}" for n in range(7)]
    for texts, rows, _ in ASKED:
        for text, row in zip(texts, rows, strict=True):
            place = int(text.split()[1])
            assert row == seven().samples[place].row | {"finish": "stop" if place % 2 else "length"}
    assert max(len(texts) for texts, _, _ in ASKED) == math.ceil(7 / processes)


def test_samples_keep_their_rows_as_they_were() -> None:
    rollouts = seven()
    give_rewards(accelerator_for(CPU, "bfloat16"), mixture_of().begin(), rollouts)
    assert all(set(sample.row) == {"id", "kind"} for sample in rollouts.samples)
    # Learned rewards multiply in the stage's precision.
    give_rewards(accelerator_for(CPU, "float32"), mixture_of().begin(), rollouts)
    assert [autocast for _, _, autocast in ASKED] == [True, False]


# Soft overlong punishment.


def completions_of(lengths: Sequence[int], finishes: Sequence[str], rewards: Sequence[float]) -> Rollouts:
    samples = []
    for place, (length, finish) in enumerate(zip(lengths, finishes, strict=True)):
        completion: Any = Completion([5] * length, [0.0] * length, finish)  # pyright: ignore[reportArgumentType]
        samples.append(Sample({"id": f"{place}"}, 0, [1], completion, ""))
    rollouts = Rollouts(samples)
    rollouts.each["reward"] = torch.tensor(rewards, dtype=torch.float64)
    return rollouts


def punished(rollouts: Rollouts, limit: int, **truncation: Any) -> tuple[list[float], list[float]]:
    punish_length(rollouts, Truncation(how="penalise", **truncation), limit)
    assert {values.dtype for values in rollouts.each.values()} == {torch.float64}
    return rollouts.each["reward"].tolist(), rollouts.each["rewards.overlong"].tolist()


def test_the_penalty_by_hand() -> None:
    """L_max 20, L_cache 8: from 12 tokens on it rises by an eighth a token, to all of it at 20."""
    lengths = [1, 12, 13, 16, 19, 20, 20]
    rollouts = completions_of(lengths, ["stop"] * 6 + ["length"], [1.0, 1.0, 1.0, -1.0, NAN, 0.0, 0.0])
    rewards, overlong = punished(rollouts, 20, window=8)
    assert overlong == [0, 0, -1 / 8, -4 / 8, -7 / 8, -1, -1]
    assert rewards == pytest.approx([1.0, 1.0, 7 / 8, -1.5, NAN, -1.0, -1.0], nan_ok=True)
    rewards, overlong = punished(completions_of(lengths, ["stop"] * 6 + ["length"], [1.0] * 7), 20, window=8, penalty=0.5)
    assert overlong == [0, 0, -1 / 16, -1 / 4, -7 / 16, -0.5, -0.5]
    assert rewards == [1 + one for one in overlong]


def test_without_a_window_only_what_is_cut_off_is_punished() -> None:
    rollouts = completions_of([20, 20, 19, 1], ["stop", "length", "stop", "stop"], [1.0, 1.0, NAN, 2.0])
    rewards, overlong = punished(rollouts, 20, penalty=3.0)
    assert overlong == [0, -3, 0, 0]
    assert rewards == pytest.approx([1, -2, NAN, 2], nan_ok=True)


def test_what_the_context_cut_off_earlier_is_punished_in_full() -> None:
    _, overlong = punished(completions_of([5, 5], ["length", "stop"], [0.0, 0.0]), 20, window=4)
    assert overlong == [-1, 0]


def test_other_numbers_are_left_alone() -> None:
    rollouts = completions_of([20], ["length"], [1.0])
    before = rollouts.each["rewards.told"] = torch.tensor([7.0], dtype=torch.float64)
    punished(rollouts, 20)
    assert set(rollouts.each) == {"reward", "rewards.told", "rewards.overlong"}
    assert rollouts.each["rewards.told"] is before


def dapo(length: int, limit: int, window: int) -> float:
    """DAPO, arXiv 2503.14476 eq. 13."""
    if length <= limit - window:
        return 0.0
    return (limit - window - length) / window if length <= limit else -1.0


@settings(max_examples=100, deadline=None)
@given(data=st.data(), limit=st.integers(1, 30), penalty=st.integers(1, 8))
def test_the_penalty_is_dapo_s(data: st.DataObject, limit: int, penalty: int) -> None:
    window = data.draw(st.integers(0, limit))
    lengths = data.draw(st.lists(st.integers(1, limit), min_size=1, max_size=6))
    finishes = ["length" if one == limit and data.draw(st.booleans()) else "stop" for one in lengths]
    _, overlong = punished(completions_of(lengths, finishes, [0.0] * len(lengths)), limit, window=window, penalty=penalty)
    # A completion that goes on beyond the limit is one token too long.
    told = [dapo(length + (end == "length"), limit, window) for length, end in zip(lengths, finishes, strict=True)]
    assert overlong == pytest.approx([penalty * one for one in told])


def test_joined_and_resumed_completions_keep_their_steps(tmp_path: Path) -> None:
    rollouts = seven()
    give_rewards(accelerator_for(CPU, "float32"), mixture_of().begin(), rollouts)
    assert [len(steps) for steps in rollouts.steps] == [3, 2, 2, 3, 0, 2, 3]
    assert rollouts.joined(rollouts).steps == rollouts.steps * 2
    rollouts.save(tmp_path)
    found = Rollouts.load(tmp_path, {sample.row["id"]: sample.row for sample in rollouts.samples})
    assert found is not None
    assert found.steps == rollouts.steps
