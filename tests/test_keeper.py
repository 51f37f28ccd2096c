"""Which lost pipelines are started again, and how."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound

from flows.keeper import LONGEST_CANCELLING, LONGEST_PENDING, QUIET, RECENT, end_stuck, report_lost, start_lost
from flows.processes import known, recorded

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MOMENT = timedelta(seconds=1)


class Server:
    """A Prefect client that knows one crashed run."""

    def __init__(self, ago: timedelta) -> None:
        state: State[Any] = State(type=StateType.CRASHED, timestamp=NOW - ago)
        self.run = SimpleNamespace(id=uuid4(), name="tiny", state=state)
        self.asked: Any = None
        self.told: list[tuple[UUID, State[Any], bool]] = []

    def read_flow_runs(self, flow_run_filter: Any, **_: Any) -> list[Any]:
        self.asked = flow_run_filter
        return [self.run]

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool) -> None:
        self.told.append((run, state, force))


@pytest.mark.parametrize(
    ("ago", "started"),
    [(QUIET - MOMENT, False), (QUIET + MOMENT, True), (RECENT - MOMENT, True), (RECENT + MOMENT, False)],
)
def test_one_that_was_lost_a_moment_ago_is_started_again(ago: timedelta, started: bool) -> None:
    """Not at once, since a worker tells twice, and not what was lost long ago."""
    server: Any = Server(ago)
    assert start_lost(server, NOW) == (["tiny"] if started else [])
    assert len(server.told) == started
    for run, state, force in server.told:
        assert (run, state.type, state.name, force) == (server.run.id, StateType.SCHEDULED, "AwaitingRetry", True)


def test_pipelines_alone_are_looked_for() -> None:
    """A step is its pipeline's to send again."""
    server: Any = Server(QUIET)
    start_lost(server, NOW)
    assert server.asked.tags.all_ == ["pipeline"]
    assert server.asked.state.type.any_ == [StateType.CRASHED]


class Lost:
    """A Prefect client that knows flow runs by their state."""

    def __init__(self, **states: StateType) -> None:
        self.states = {UUID(int=int(name[1:])): state for name, state in states.items()}
        self.told: dict[UUID, StateType] = {}

    def read_flow_run(self, run: UUID) -> Any:
        if run not in self.states:
            raise ObjectNotFound(Exception("no such run"))
        return SimpleNamespace(state=State(type=self.states[run]))

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool) -> None:
        assert force
        self.told[run] = state.type


def record(root: Path, number: int, pid: int) -> None:
    (root / "processes").mkdir(exist_ok=True)
    (root / "processes" / f"{pid}.json").write_text(json.dumps({"pid": pid, "flow_run": str(UUID(int=number))}))


def test_runs_whose_process_is_gone_are_told_of(tmp_path: Path) -> None:
    """Once; not those that have ended, wait for their next start, or have another process."""
    ends = {"r1": StateType.RUNNING, "r2": StateType.PENDING, "r3": StateType.CANCELLING}
    stay = {"r4": StateType.COMPLETED, "r5": StateType.CRASHED, "r6": StateType.SCHEDULED, "r7": StateType.RUNNING}
    client: Any = Lost(**ends, **stay)
    for number in range(1, 9):
        record(tmp_path, number, 10_000_000 + number)
    with recorded(tmp_path, str(UUID(int=7))):
        report_lost(client, tmp_path)
        crashed, cancelled = StateType.CRASHED, StateType.CANCELLED
        assert client.told == {UUID(int=1): crashed, UUID(int=2): crashed, UUID(int=3): cancelled}
        assert [one.flow_run for one in known(tmp_path)] == [str(UUID(int=7))]


@pytest.mark.parametrize("state", [StateType.PENDING, StateType.CANCELLING])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pool", ["gpu", "cluster", None])
def test_what_nobody_is_at_any_more_is_ended(state: StateType, late: bool, pool: str | None) -> None:
    """On pools of processes alone: a cluster may take long to begin, and a terminal's run is nobody's but its own."""
    limit = LONGEST_PENDING if state == StateType.PENDING else LONGEST_CANCELLING
    then = NOW - limit + (-MOMENT if late else MOMENT)
    run = SimpleNamespace(id=uuid4(), work_pool_name=pool, state=State(type=state, timestamp=then))
    told: list[tuple[UUID, StateType]] = []

    def read_flow_runs(flow_run_filter: Any, limit: int) -> list[Any]:
        assert flow_run_filter.tags.all_ == ["posttrain"]
        return [run] if flow_run_filter.state.type.any_ == [state] else []

    def set_flow_run_state(run: UUID, end: State[Any], force: bool) -> None:
        told.append((run, end.type))

    client: Any = SimpleNamespace(read_flow_runs=read_flow_runs, set_flow_run_state=set_flow_run_state)
    end_stuck(client, NOW, {"control", "cpu", "gpu"})
    end = StateType.CRASHED if state == StateType.PENDING else StateType.CANCELLED
    assert told == ([(run.id, end)] if late and pool == "gpu" else [])
