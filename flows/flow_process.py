"""What a worker starts as a process for a flow run: Prefect's engine, which outlives its worker.

With a worker that dies, the pipe for its processes' output and the ear for cancellations are gone. So a run writes into its
worker's log by itself, and once it has lost its worker asks the server whether somebody cancels it.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from flows.processes import recorded
from tasks.home import PATIENT_RUNS, home

LOG = "POSTTRAIN_WORKER_LOG"
POLL_SECONDS = 5.0


def main() -> None:
    """Run the flow run of the environment to its end."""
    write_to(os.environ.get(LOG))
    os.environ |= PATIENT_RUNS
    flow_run = os.environ["PREFECT__FLOW_RUN_ID"]
    with recorded(home(), flow_run), cancelled_without_worker(flow_run):
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def write_to(log: str | None) -> None:
    """Have all that this process and its children say at the end of a file."""
    if log is None:
        return
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


@contextmanager
def cancelled_without_worker(flow_run: str) -> Iterator[None]:
    """End the block as a worker would when its flow run is cancelled and there is no worker any more."""
    worker, ended, cancelled = os.getppid(), threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if os.getppid() != worker and _cancelling(flow_run):
                cancelled.set()
                _terminate()
                return

    threading.Thread(target=watch, name="orphan", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if cancelled.is_set():
            _cancel(flow_run)


def _cancelling(flow_run: str) -> bool:
    """Whether somebody wants the end; False while the server is away."""
    from httpx import HTTPError
    from prefect import get_client
    from prefect.client.schemas.objects import StateType

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
    except HTTPError:
        return False
    return state is not None and state.type == StateType.CANCELLING


def _terminate() -> None:
    """What a worker does to a run that is cancelled. Prefect (3.8) knows no other word for it: without, the run crashes."""
    from prefect._internal import control_listener

    control_listener._set_intent("cancel")
    os.kill(os.getpid(), signal.SIGTERM)


def _cancel(flow_run: str) -> None:
    from prefect import get_client
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(flow_run), Cancelled(message="Cancelled after its worker was lost"), force=True)


if __name__ == "__main__":
    main()
