"""A step on a pool: whose child is waited for, when another is sent, when it is given up. Prefect itself is in tests/slow/."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound

from flows.step import step
from stages.errors import InputError
from tasks import dispatch as module
from tasks.dispatch import LOSSES, dispatch
from tasks.plan import StepCall

CALL = StepCall(recipe="r", name="tune", stage="sft", config={}, inputs={}, pipeline="p")
COMPLETED, CRASHED, FAILED, CANCELLED = StateType.COMPLETED, StateType.CRASHED, StateType.FAILED, StateType.CANCELLED
Play = Callable[..., list[str]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Dispatch where others' children are found and ours end as told; what was done, in order."""

    def run(others: list[StateType | None], ours: list[StateType]) -> list[str]:
        did: list[str] = []
        waiting, ends = iter(others), iter(ours)
        found: list[StateType] = []

        def running(key: str) -> Any:
            assert key == "key"
            other = next(waiting, None)
            if other is not None:
                found.append(other)
            return None if other is None else "another's"

        def send(call: StepCall, key: str, pool: str) -> Any:
            assert (call, key, pool) == (CALL, "key", "gpu")
            did.append("send")
            return "ours"

        def wait(call: StepCall, child: Any, pool: str, ours: bool) -> State[Any]:
            assert ours == (child == "ours")
            did.append(f"wait for {child}")
            return State(type=next(ends) if ours else found.pop(), message="its words")

        monkeypatch.setattr(module, "server", lambda: "http://somewhere")
        for name, stand_in in (("_running", running), ("_send", send), ("_wait", wait)):
            monkeypatch.setattr(module, name, stand_in)
        dispatch(CALL, "key", "gpu")
        return did

    return run


def test_a_child_is_sent_and_waited_for(play: Play) -> None:
    assert play([], [COMPLETED]) == ["send", "wait for ours"]


def test_one_that_runs_already_is_waited_for(play: Play) -> None:
    assert play([COMPLETED], []) == ["wait for another's"]


@pytest.mark.parametrize("end", [FAILED, CANCELLED, CRASHED])
def test_another_s_end_says_nothing_about_ours(play: Play, end: StateType) -> None:
    assert play([end], [COMPLETED]) == ["wait for another's", "send", "wait for ours"]


def test_a_lost_child_is_sent_again(play: Play) -> None:
    assert play([], [CRASHED, CRASHED, COMPLETED]) == ["send", "wait for ours"] * 3


def test_one_that_is_always_lost_is_given_up(play: Play) -> None:
    with pytest.raises(RuntimeError, match=rf"tune: its process on gpu was lost {LOSSES} times; at last: its words"):
        play([], [CRASHED] * LOSSES)


@pytest.mark.parametrize(("end", "words"), [(FAILED, "its words"), (CANCELLED, "its flow run on gpu was cancelled")])
def test_a_child_that_failed_says_why(play: Play, end: StateType, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"^tune: {words}$"):
        play([], [end])


def test_a_pool_that_takes_no_steps_is_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ObjectNotFound(RuntimeError("404"))

    monkeypatch.setattr(module, "run_deployment", missing)
    monkeypatch.setattr(module, "get_client", lambda **_: nullcontext(Deployments()))
    with pytest.raises(InputError, match=r"^tune: no work pool control takes steps; those that do are cpu, gpu$"):
        module._send(CALL, "key", "control")


class Deployments:
    """A Prefect client that knows deployments of steps, one of them without its pool."""

    def read_deployments(self, flow_filter: Any) -> list[Any]:
        assert flow_filter.name.any_ == [step.name]
        return [
            SimpleNamespace(name=name, work_pool_name=pool) for name, pool in (("gpu", "gpu"), ("cpu", "cpu"), ("old", None))
        ]


def test_without_servers_it_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "server", lambda: None)
    with pytest.raises(InputError, match=r"tune: the work pool gpu needs servers .* `posttrain up`, .* --set pools=\{\}"):
        dispatch(CALL, "key", "gpu")
