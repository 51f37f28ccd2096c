"""Looks after a server: starts pipelines again whose process was lost, and clears away old leases.

A pipeline that starts again finds what it has computed, and the steps that still run.

Not an automation of Prefect's: that hears of a scheduled run's states only a quarter of an hour later, since their first event,
which the others wait for, is never sent (3.8.8).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

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
from prefect.states import AwaitingRetry

from flows.deploy import PIPELINE_TAG
from tasks.lease import forget_old

POLL_SECONDS = 3.0
# A worker tells twice that a process is gone: the second word must not meet a run that has begun again.
QUIET = timedelta(seconds=10)
# What was lost longer ago is for a person to decide.
RECENT = timedelta(hours=1)
CLEAR_SECONDS = 24 * 3600.0


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


def keep(say: Callable[[str], None]) -> None:
    """Look after lost pipelines for ever, in a thread of its own: it waits for a server that is away."""

    def look() -> None:
        cleared: float | None = None
        while True:
            time.sleep(POLL_SECONDS)
            try:
                with get_client(sync_client=True) as client:
                    if cleared is None or time.monotonic() - cleared > CLEAR_SECONDS:
                        forget_old(client, datetime.now(UTC))
                        cleared = time.monotonic()
                    for name in start_lost(client, datetime.now(UTC)):
                        say(f"{name}: its process was lost; it is started again")
            except HTTPError:
                # The server is being started again.
                continue

    threading.Thread(target=look, name="keeper", daemon=True).start()
