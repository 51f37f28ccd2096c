"""Verifiers beside generation: they begin while others of the step are still drawn, and say the same as after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpo_bench
import pytest
import torch
from conftest import request_for
from grpo_bench import Folders, train
from pooled_rewards import number_of
from ppo_bench import events, records
from test_collect import on_ranks
from test_rollouts import rollouts_of

from stages.errors import InputError
from stages.request import run_stage
from stages.rewards import REWARDS, pool, score
from stages.rewards.base import RewardEntry, Row, Score
from stages.rewards.mix import Mixed, Mixture
from stages.rollouts import engine, rewarded
from stages.rollouts.rewarded import give_rewards, verify_as_ended
from stages.run import Run
from stages.specs.common import WeightedReward

folders = grpo_bench.folders
rewards_of_tests = grpo_bench.rewards_of_tests
SAMPLING = {"max_new_tokens": 8}
RUNTIME = {"device": "cpu", "threads": 1}
WARM: list[Score | None] = [Score(4.0, {"n": 1}, [1.0], [0], "kept")]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("odd", "heard"):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"pooled_rewards:{name}", version=1, pooled=True))
    monkeypatch.setitem(REWARDS, "here", RewardEntry("pooled_rewards:heard", version=1))


@pytest.fixture
def heard(tmp_path: Path) -> Path:
    """Where the verifier leaves its files. Its workers are up: none of a test's timeouts is for their start."""
    assert score("odd", ["abc"], [{"n": 1}]) == WARM
    (tmp_path / "heard").mkdir()
    return tmp_path / "heard"


def part(folder: Path, timeout: float = 60.0, **args: Any) -> dict[str, Any]:
    return {"name": "heard", "timeout": timeout, "args": {"folder": str(folder), **args}}


def grpo_run(folders: Folders, path: Path, *parts: dict[str, Any], **changes: Any) -> Run:
    return train(folders, path, **{"steps": 1, "rewards": [*parts]} | changes)


def evaluate_run(folders: Folders, path: Path, *parts: dict[str, Any]) -> Run:
    config = {"samples": 3, "sampling": SAMPLING, "runtime": RUNTIME, "bootstrap": 100}
    config |= {"verifier": parts[0], "rewards": [*parts[1:]]}
    return run_stage(request_for("evaluate", path, config, policy=folders["policy"], prompts=folders["prompts"]))


def sample_run(folders: Folders, path: Path, *parts: dict[str, Any]) -> Run:
    config = {"samples": 3, "sampling": SAMPLING, "runtime": RUNTIME, "best_of": {"rewards": [*parts]}}
    return run_stage(request_for("sample", path, config, policy=folders["policy"], prompts=folders["prompts"]))


# When they begin.


@pytest.mark.parametrize("stage", [grpo_run, evaluate_run, sample_run])
def test_a_verifier_is_at_work_before_the_last_completion_has_ended(
    stage: Callable[..., Run], folders: Folders, heard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits, once something has been handed over, until the verifier has been heard."""
    handed: list[pool.Call] = []
    before_draw: list[int] = []
    call, draw = pool.Call.__init__, engine.draw

    def hand_over(self: pool.Call, *given: Any) -> None:
        call(self, *given)
        handed.append(self)

    def waiting_draw(*given: Any) -> Any:
        deadline = time.monotonic() + 60
        while handed and not any(heard.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        before_draw.append(len(list(heard.iterdir())))
        return draw(*given)

    monkeypatch.setattr(pool.Call, "__init__", hand_over)
    monkeypatch.setattr(engine, "draw", waiting_draw)
    stage(folders, tmp_path / "run", part(heard))
    # All were drawn in one batch.
    assert len(before_draw) == 8
    assert before_draw[0] == 0 < before_draw[-1]


# What becomes of them.


def test_a_hanging_verifier_costs_its_own_sample(folders: Folders, heard: Path, tmp_path: Path) -> None:
    run = grpo_run(folders, tmp_path / "run", part(heard, timeout=1.0, hangs=5))
    found = [(number_of(row["completion"]), row["reward"], row["notes"]) for row in records(run)]
    assert found == [
        (n, None, "heard: timeout") if n % 5 == 0 else (n, pytest.approx(n % 7 / 6), "heard: heard") for n, _, _ in found
    ]
    [metrics] = [event["metrics"] for event in events(run, "metrics") if event["step"] == 1]
    hung = sum(n % 5 == 0 for n, _, _ in found)
    assert metrics["notes.heard.timeout"] == metrics["rewards_missing"] == hung
    assert 0 < hung < len(found) == 16


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 2},
    "small batches": {"runtime": {"generation_batch": 3}},
    "again": {"steps": 2, "prompts": 12, "refill": {"rounds": 2}},  # there are 9: some come twice
    "penalty": {"truncation": {"how": "penalise", "window": 4}},
    "steps": {"supervision": "process"},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_rollouts_are_those_of_verifying_after_the_sampling(
    name: str, folders: Folders, heard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        part(heard, gaps=9) | {"where": {"kind": "sum"}},
        {"name": "length", "weight": 2.0},
        {"name": "stepped", "weight": 0.5},
        part(heard) | {"label": "too", "weight": -0.5},
    ]
    beside = grpo_run(folders, tmp_path / "beside", *parts, **SETTINGS[name])
    given: list[tuple[str, Row]] = []

    def after(accelerator: Any, begun: Any, rollouts: Any) -> list[Mixed]:
        """One call of the whole mixture, on all completions in order."""
        rows = [{**sample.row, "finish": sample.completion.finish} for sample in rollouts.samples]
        given.extend((sample.text, row) for sample, row in zip(rollouts.samples, rows, strict=True))
        mixed = begun.mixture([sample.text for sample in rollouts.samples], rows)
        begun.mixture = Replay(begun.mixture, mixed)
        return give_rewards(accelerator, begun, rollouts)

    monkeypatch.setattr("stages.grpo.verify_as_ended", lambda _: lambda *_: None)
    monkeypatch.setattr("stages.grpo.give_rewards", after)
    afterwards = grpo_run(folders, tmp_path / "after", *parts, **SETTINGS[name])
    assert records(beside) == records(afterwards)
    assert len(given) == len(records(beside)) >= 16
    assert (beside.folder / "outputs/rollouts/data.parquet").read_bytes() == (
        afterwards.folder / "outputs/rollouts/data.parquet"
    ).read_bytes()
    assert {row["notes"] for row in records(beside)} >= {"too: heard"}


class Replay:
    """A mixture whose results are known."""

    def __init__(self, mixture: Mixture, known: Sequence[Mixed]) -> None:
        self.keys, self._known = mixture.keys, iter(known)

    def unpooled(self, texts: Sequence[str], _: Any) -> list[Any]:
        return [{} for _ in texts]

    def mixed(self, *_: Any) -> Mixed:
        return next(self._known)


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_what_each_process_drew_it_verifies_and_all_end_with_all_of_it(processes: int, heard: Path) -> None:
    parts = [
        WeightedReward.model_validate(one)
        for one in (part(heard, gaps=2), part(heard) | {"name": "here"}, part(heard) | {"label": "b"})
    ]
    mixture, asked = Mixture(parts), rollouts_of([(1, 2)] * 7)
    expected = mixture([sample.text for sample in asked.samples], [sample.row for sample in asked.samples])
    assert {tuple(one.notes) for one in expected} == {("here", "heard", "b")}

    def give(accelerator: Any) -> tuple[Any, list[Mixed]]:
        rollouts = rollouts_of([(1, 2)] * 7)
        with mixture.begin() as begun:
            # Each has drawn some of them, whichever, and they have ended from the last to the first.
            for place in reversed(range(7)):
                if place * place % processes == accelerator.process_index:
                    verify_as_ended(begun)(place, rollouts.samples[place])
            return rollouts.each, give_rewards(accelerator, begun, rollouts)

    for each, verdicts in on_ranks(processes, give, rewarded):
        assert verdicts == expected
        # The notes of a row tell its parts in one order, whoever asked them.
        assert [list(one.notes) for one in verdicts] == [["here", "heard", "b"]] * 7
        totals = [float("nan") if one.total is None else one.total for one in expected]
        torch.testing.assert_close(each["reward"], torch.tensor(totals, dtype=torch.float64), equal_nan=True, rtol=0, atol=0)


def test_results_are_in_order_of_places_whatever_came_first(heard: Path) -> None:
    mixture = Mixture(
        [WeightedReward.model_validate(one) for one in (part(heard) | {"where": {"kind": "a"}}, {"name": "length"})]
    )
    texts, rows = [f"text {n}" for n in range(9)], [{"id": n, "kind": "ab"[n % 2]} for n in range(9)]
    with mixture.begin() as begun:
        for place in (4, 8, 0, 3, 1, 2, 7, 6, 5):
            begun.add(place, texts[place], rows[place])
        assert begun.finish() == mixture(texts, rows)
    assert Mixture([]).begin().finish() == []


@pytest.mark.parametrize(("size", "expected"), [(7, [7, 14, 21, 27]), (9, [9, 18, 27])])
def test_evaluation_tells_how_far_it_is_after_each_batch(
    size: int, expected: list[int], folders: Folders, heard: Path, tmp_path: Path
) -> None:
    config = {"samples": 3, "sampling": SAMPLING, "runtime": RUNTIME | {"generation_batch": size}, "bootstrap": 100}
    config |= {"verifier": part(heard)}
    run = run_stage(request_for("evaluate", tmp_path / "run", config, policy=folders["policy"], prompts=folders["prompts"]))
    assert [event["done"] for event in events(run, "progress")] == expected
    assert {event["total"] for event in events(run, "progress")} == {27}


# Errors.


@pytest.mark.parametrize("stage", [grpo_run, evaluate_run, sample_run])
def test_an_engine_that_fails_leaves_nothing_behind_that_the_next_call_waits_for(
    stage: Callable[..., Run], folders: Folders, heard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[pool.Call] = []
    call, draw = pool.Call.__init__, engine.draw

    def hand_over(self: pool.Call, *given: Any) -> None:
        call(self, *given)
        handed.append(self)

    def failing_draw(*given: Any) -> Any:
        if len(handed) > 1:
            raise ArithmeticError("in mid-batch")
        return draw(*given)

    monkeypatch.setattr(pool.Call, "__init__", hand_over)
    monkeypatch.setattr(engine, "draw", failing_draw)
    with pytest.raises(ArithmeticError, match="in mid-batch"):
        stage(folders, tmp_path / "run", part(heard, timeout=3600.0, hangs=1))
    monkeypatch.undo()
    assert len(handed) > 1
    REWARDS["odd"] = RewardEntry("pooled_rewards:odd", version=1, pooled=True)
    try:
        assert score("odd", ["abc"], [{"n": 1}], 30.0) == WARM
    finally:
        del REWARDS["odd"]


@pytest.mark.parametrize("stage", [grpo_run, evaluate_run, sample_run])
def test_a_verifier_that_raises_names_the_row(stage: Callable[..., Run], folders: Folders, heard: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reward 'odd' raised KeyError on the row with id '[^']+': 'n'"):
        stage(folders, tmp_path / "run", {"name": "odd"})
