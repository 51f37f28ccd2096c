"""Looks after flow runs: tells of those whose process was lost, starts lost pipelines again, clears away what is stuck or old.

A pipeline that starts again finds what it has computed, and the steps that still run.

Not an automation of Prefect's: that hears of a scheduled run's states only a quarter of an hour later, since their first event,
which the others wait for, is never sent (3.8.8).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from httpx import HTTPError
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed

from flows.deploy import PIPELINE_TAG
from flows.processes import known, stop_left
from tasks.home import OURS_TAG
from tasks.lease import forget_old

POLL_SECONDS = 3.0
# A worker tells twice that a process is gone: the second word must not meet a run that has begun again.
QUIET = timedelta(seconds=10)
# What was lost longer ago is for a person to decide.
RECENT = timedelta(hours=1)
CLEAR_SECONDS = 24 * 3600.0
# A process begins within seconds, and a worker ends one that is cancelled within a minute.
LONGEST_PENDING = timedelta(minutes=5)
LONGEST_CANCELLING = timedelta(minutes=2)


def start_lost(client: SyncPrefectClient, now: datetime) -> list[str]:
    """Start pipelines again that have crashed a moment ago; their names."""
    crashed = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED]))
    chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=[PIPELINE_TAG]), state=crashed)
    started = []
    for run in client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.END_TIME_DESC, limit=100):
        if run.state is not None and QUIET < now - run.state.timestamp < RECENT:
            message = "Its process was lost; it goes on from what is published and saved"
            client.set_flow_run_state(run.id, AwaitingRetry(message=message), force=True)
            started.append(run.name)
    return started


def report_lost(client: SyncPrefectClient, root: Path) -> None:
    """Tell the server of this machine's flow runs whose process is gone: steps are sent again, pipelines started again."""
    every = known(root)
    living = {one.flow_run for one in every if one.alive}
    for one in every:
        if one.alive:
            continue
        if one.flow_run not in living:
            _report(client, UUID(one.flow_run))
        one.record.unlink(missing_ok=True)


def _report(client: SyncPrefectClient, run: UUID) -> None:
    try:
        state = client.read_flow_run(run).state
    except ObjectNotFound:
        return
    if state is not None and state.type in (StateType.RUNNING, StateType.PENDING):
        client.set_flow_run_state(run, Crashed(message="Its process is gone"), force=True)
    elif state is not None and state.type == StateType.CANCELLING:
        client.set_flow_run_state(run, Cancelled(message="Its process is gone"), force=True)


def end_stuck(client: SyncPrefectClient, now: datetime, pools: Collection[str]) -> None:
    """End what nobody is at any more, on these pools of processes: begun or cancelled where a machine was lost."""
    for state, limit, end in (
        (StateType.PENDING, LONGEST_PENDING, Crashed(message=f"It has not begun for {LONGEST_PENDING}")),
        (StateType.CANCELLING, LONGEST_CANCELLING, Cancelled(message=f"Nobody has ended it for {LONGEST_CANCELLING}")),
    ):
        chosen = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[OURS_TAG]), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[state]))
        )
        for run in client.read_flow_runs(flow_run_filter=chosen, limit=100):
            if run.work_pool_name in pools and run.state is not None and now - run.state.timestamp > limit:
                client.set_flow_run_state(run.id, end, force=True)


def keep(root: Path, say: Callable[[str], None], pools: Collection[str] | None) -> None:
    """Look after this machine's flow runs for ever, in a thread of its own, and after all of the servers' if `pools` is given:
    the names of those that start processes. Waits for a server that is away."""

    def look() -> None:
        cleared: float | None = None
        while True:
            time.sleep(POLL_SECONDS)
            try:
                with get_client(sync_client=True) as client:
                    report_lost(client, root)
                    if pools is None:
                        continue
                    if cleared is None or time.monotonic() - cleared > CLEAR_SECONDS:
                        forget_old(client, datetime.now(UTC))
                        cleared = time.monotonic()
                    end_stuck(client, datetime.now(UTC), pools)
                    for name in start_lost(client, datetime.now(UTC)):
                        say(f"{name}: its process was lost; it is started again")
            except HTTPError:
                # The server is being started again.
                continue

    threading.Thread(target=look, name="keeper", daemon=True).start()


def leave(root: Path) -> None:
    """Stop the flow runs' processes that are left here, and tell the server, unless that is away, too."""
    stop_left(root)
    with suppress(HTTPError), get_client(sync_client=True) as client:
        report_lost(client, root)
