"""Notes, which say why a verdict is what it is: from a reward into the mixture, the log, the dataset, and a resumed run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_rollouts import rollouts_of

from stages.data.recorded import of_one_sample
from stages.errors import InputError
from stages.rewards import REWARDS
from stages.rewards.base import RewardEntry, Row, Score, verdict
from stages.rewards.mix import Mixed, Mixture
from stages.rollouts.batch import Rollouts
from stages.rollouts.report import rollout_metrics, rollout_records
from stages.rollouts.rewarded import give_rewards
from stages.specs.common import RewardRef, WeightedReward

ORDER: list[str] = []


def noted(completions: Sequence[str], rows: Sequence[Row], note: str | None = "fine") -> list[Score | None]:
    """2 for each completion, with a note; no verdict of an empty one; nothing at all of `?`."""
    ORDER.append("here")
    return [None if text == "?" else Score(2.0 if text else None, note=note) for text in completions]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "noted", RewardEntry(f"{__name__}:noted", version=1))
    ORDER.clear()


def part(name: str, **given: Any) -> WeightedReward:
    return WeightedReward(name=name, **given)


@pytest.mark.parametrize(
    ("one", "expected"),
    [(None, None), (Score(None, note="timeout"), None), (Score(math.nan), None), (Score(-math.inf), None), (Score(0), 0.0)],
)
def test_verdicts(one: Score | None, expected: float | None) -> None:
    assert verdict(one) == expected


def test_a_mixture_keeps_the_notes_of_every_part() -> None:
    parts = [part("noted"), part("noted", label="other", weight=3.0, args={"note": None}), part("answer", weight=0.5)]
    rows = [{"id": n, "answer": "a"} for n in range(3)]
    assert Mixture(parts)(["a", "", "?"], rows) == [
        Mixed(8.0, {"noted": 2.0, "other": 2.0, "answer": 0.0}, [(0, 0.0), (0, 2.0), (0, 6.0)], {"noted": "fine"}),
        Mixed(None, {"noted": None, "other": None, "answer": 0.0}, notes={"noted": "fine"}),
        Mixed(None, {"noted": None, "other": None, "answer": 0.0}),
    ]


def test_a_part_of_weight_0_without_a_verdict_is_only_reported() -> None:
    (one,) = Mixture([part("noted", weight=0.0), part("answer")])([""], [{"answer": "a"}])
    assert one == Mixed(0.0, {"noted": None, "answer": 0.0}, [(0, 0.0)], {"noted": "fine"})


def test_a_timeout_leaves_the_completion_without_a_reward_and_says_so() -> None:
    mixture = Mixture([part("math", timeout=2.0), part("length")])
    rows = [{"id": "row", "answer": "4"}] * 2
    hung, right = mixture(["<answer>(10^{10})!</answer>", "<answer>4</answer>"], rows)
    assert (hung.total, hung.parts["math"], hung.notes) == (None, None, {"math": "timeout"})
    assert (right.total, right.notes) == (1.0 - 0.001 * 18, {})


def test_pooled_parts_begin_before_the_others_work_and_are_waited_for_after(monkeypatch: pytest.MonkeyPatch) -> None:
    class Call:
        def __init__(self, _target: str, timeout: float, *_: Any) -> None:
            ORDER.append(f"submitted with {timeout}")

        def result(self) -> list[Score]:
            ORDER.append("gathered")
            return [Score(1.0)]

        def cancel(self) -> None:
            ORDER.append("let go")

    monkeypatch.setattr("stages.rewards.pool.Call", Call)
    found = Mixture([part("noted"), part("math", timeout=7.0)])(["a"], [{"answer": "4"}])
    assert ORDER == ["submitted with 7.0", "here", "gathered", "let go"]
    assert found == [Mixed(3.0, {"noted": 2.0, "math": 1.0}, [(0, 1.0), (0, 2.0)], {"noted": "fine"})]


def test_rows_are_checked_by_the_parts_that_rate_them() -> None:
    mixture = Mixture([part("math", where={"kind": "math"}), part("answer")])
    good = [{"id": "a", "answer": "4", "kind": "math"}, {"id": "b", "answer": "?", "kind": "text"}]
    mixture.check_rows(good)
    with pytest.raises(InputError, match=r"the row with id 'c', for the reward 'math': \"answer\" is '\?', which math-verify"):
        mixture.check_rows([*good, {"id": "c", "answer": "?", "kind": "math"}])


@pytest.fixture
def rated() -> Rollouts:
    rollouts = rollouts_of([(2, 3), (1, 1), (1, 2)])
    rollouts.tokens["advantages"] = torch.zeros(6)
    rollouts.each["reward"] = torch.tensor([1.0, math.nan, 0.0]).double()
    rollouts.notes = [
        {},
        {"math": "timeout", "judge": "no: it did not say"},
        {"math": "timeout", "choice": "answer not parsed"},
    ]
    return rollouts


def test_each_step_counts_notes_by_reward_and_reason(rated: Rollouts) -> None:
    counted = {name: value for name, value in rollout_metrics(rated).items() if name.startswith("notes")}
    assert counted == {"notes.math.timeout": 2.0, "notes.judge.no": 1.0, "notes.choice.answer_not_parsed": 1.0}


def test_a_record_tells_its_notes(rated: Rollouts) -> None:
    assert [row["notes"] for row in rollout_records(rated, 1)] == [
        None,
        "math: timeout; judge: no: it did not say",
        "math: timeout; choice: answer not parsed",
    ]
    rated.notes = []
    assert all("notes" not in row for row in rollout_records(rated, 1))
    assert of_one_sample("notes")


def test_a_resumed_run_and_joined_completions_keep_their_notes(rated: Rollouts, tmp_path: Path) -> None:
    rated.save(tmp_path)
    rows = {sample.row["id"]: sample.row for sample in rated.samples}
    found = Rollouts.load(tmp_path, rows)
    assert found is not None
    assert found.notes == rated.notes
    assert found.joined(rated).notes == rated.notes * 2


def test_rewards_give_their_notes_to_the_completions() -> None:
    rollouts = rollouts_of([(1, 1), (1, 2)])
    rollouts.samples[0].row["answer"] = rollouts.samples[1].row["answer"] = "B"
    give_rewards(Accelerator(cpu=True), Mixture([part("noted"), part("choice")]).begin(), rollouts)
    assert rollouts.notes == [{"noted": "fine", "choice": "answer not parsed"}] * 2
    assert rollouts.each["reward"].tolist() == [2.0, 2.0]


def test_a_timeout_is_identity_where_it_can_change_a_verdict() -> None:
    assert RewardRef(name="math").identity() != RewardRef(name="math", timeout=5.0).identity()
    assert RewardRef(name="answer").identity() == RewardRef(name="answer", timeout=5.0).identity()
    with pytest.raises(ValueError, match="timeout"):
        RewardRef(name="math", timeout=0)
