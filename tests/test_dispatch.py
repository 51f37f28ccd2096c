"""A step on a pool: whose child is waited for, when another is sent, when it is given up. Prefect itself is in tests/slow/."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

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
            return None if other is None else SimpleNamespace(id="another's")

        def send(call: StepCall, key: str, pool: str) -> Any:
            assert (call, key, pool) == (CALL, "key", "gpu")
            did.append("send")
            return SimpleNamespace(id="ours")

        def wait(call: StepCall, child: Any, pool: str, ours: bool) -> State[Any]:
            assert ours == (child.id == "ours")
            did.append(f"wait for {child.id}")
            return State(type=next(ends) if ours else found.pop(), message="its words")

        monkeypatch.setattr(module, "server", lambda: "http://somewhere")
        for name, stand_in in (("_running", running), ("_send", send), ("_first", lambda sent, _: sent), ("_wait", wait)):
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


class Runs:
    """A Prefect client that knows the children of a key."""

    def __init__(self, *children: tuple[int, datetime | None]) -> None:
        self.children = [SimpleNamespace(id=UUID(int=number), created=created) for number, created in children]
        self.ended: list[tuple[UUID, StateType]] = []

    def read_flow_runs(self, flow_run_filter: Any) -> list[Any]:
        assert flow_run_filter.tags.all_ == ["key-key"]
        return self.children

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool) -> None:
        assert force
        self.ended.append((run, state.type))


@pytest.mark.parametrize(("ours", "ended"), [(1, []), (2, [(UUID(int=2), CANCELLED)])])
def test_of_two_that_are_sent_at_once_the_first_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, ours: int, ended: list[tuple[UUID, StateType]]
) -> None:
    """By both pipelines, in whatever order the server names them."""
    runs = Runs((2, datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC)), (1, datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)))
    monkeypatch.setattr(module, "get_client", lambda **_: nullcontext(runs))
    sent: Any = SimpleNamespace(id=UUID(int=ours))
    assert module._first(sent, "key").id == UUID(int=1)
    assert runs.ended == ended


def test_one_that_has_ended_already_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_client", lambda **_: nullcontext(Runs()))
    sent: Any = SimpleNamespace(id=UUID(int=1))
    assert module._first(sent, "key") is sent
