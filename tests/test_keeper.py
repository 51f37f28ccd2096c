"""Which lost pipelines are started again, and how."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateType

from flows.keeper import QUIET, RECENT, start_lost

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
