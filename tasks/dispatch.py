"""A step on a work pool: found there or sent there, waited for, and looked for by its key.

The child is a flow run of its own, tagged with the key. So a pipeline that was killed and starts again finds it still running
and waits for it, and of two equal pipelines one computes and the other waits; the key's lease settles what is left. A child
whose worker or process was lost is sent again, and goes on from its last saved state.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from uuid import UUID, uuid4

from httpx import HTTPError
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkPoolStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from stages.errors import InputError
from tasks import display
from tasks.home import server
from tasks.plan import StepCall

# The flow of flows/step.py, whose deployments are named as their pools.
STEP = "step"
POLL_SECONDS = 1.0
# How long the Prefect server may be away, and how often a child may be lost, before a step gives up.
PATIENCE_SECONDS = 600.0
LOSSES = 3
GOING_ON = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]


def dispatch(call: StepCall, key: str, pool: str) -> None:
    """Have a worker of the pool bring a step to its published outputs.

    Raises InputError when there is no such pool, or no worker of it for `launch.worker_timeout` seconds; RuntimeError with the
    child's words when it failed.
    """
    if server() is None:
        raise InputError(
            f"{call.name}: the work pool {pool} needs servers and workers: start them with `posttrain up`, or run it here with "
            f"--set pools={{}}"
        )
    losses = 0
    while True:
        child, ours = _running(key), False
        if child is None:
            sent = _send(call, key, pool)
            child = _first(sent, key)
            ours = child.id == sent.id
        state = _wait(call, child, pool, ours)
        if state.type == StateType.COMPLETED:
            return
        if state.type == StateType.CRASHED:
            losses += 1
            if losses >= LOSSES:
                raise RuntimeError(f"{call.name}: its process on {pool} was lost {losses} times; at last: {state.message}")
        elif ours:
            raise RuntimeError(f"{call.name}: {_words(state, pool)}")
        # Another pipeline's child that ended otherwise says nothing about ours.


def step_pools(client: SyncPrefectClient) -> list[str]:
    """The work pools that take steps: those that `posttrain up` has given the deployment of a step. `control` has none."""
    found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[STEP])))
    # One whose pool was deleted stays.
    return sorted(one.name for one in found if one.work_pool_name)


def tag(key: str) -> str:
    """What marks a key's flow runs."""
    return f"key-{key[:32]}"


def _running(key: str) -> FlowRun | None:
    """The flow run that brings a key about right now, or waits for a worker to do so."""
    going_on = FlowRunFilterState(type=FlowRunFilterStateType(any_=GOING_ON))
    chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag(key)]), state=going_on)
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=chosen)
    return min(found, key=lambda run: (run.created or datetime.max.replace(tzinfo=UTC), run.id), default=None)


def _first(sent: FlowRun, key: str) -> FlowRun:
    """The child to wait for: ours, or that of an equal pipeline that was a moment faster; then ours is taken back."""
    first = _running(key)
    if first is None or first.id == sent.id:
        return sent
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(sent.id, Cancelled(message=f"The flow run {first.id} does the same"), force=True)
    return first


def _send(call: StepCall, key: str, pool: str) -> FlowRun:
    try:
        # In a thread without a loop it returns what it made, whatever its type says.
        sent = run_deployment(
            f"{STEP}/{pool}",
            parameters={"call": call.model_dump(mode="json"), "key": key},
            flow_run_name=call.name,
            tags=[tag(key), f"stage-{call.stage}"],
            timeout=0,
            as_subflow=True,
            # A request that is sent again, because the server was busy, makes no second one.
            idempotency_key=str(uuid4()),
        )
        assert isinstance(sent, FlowRun)
        return sent
    except ObjectNotFound as error:
        with get_client(sync_client=True) as client:
            pools = ", ".join(step_pools(client))
        raise InputError(f"{call.name}: no work pool {pool} takes steps; those that do are {pools}") from error


def _words(state: State, pool: str) -> str:
    """Why a child ended without what was asked of it. Prefect's own words of one that was cancelled say that it went well."""
    if state.type == StateType.CANCELLED:
        return f"its flow run on {pool} was cancelled"
    return str(state.message or state.name)


def _wait(call: StepCall, child: FlowRun, pool: str, ours: bool) -> State:
    """The child's last state."""
    since_worker = since_answer = time.monotonic()
    said = ""
    try:
        while True:
            try:
                with get_client(sync_client=True) as client:
                    state, taken, manned = _look(client, child.id, pool)
                since_answer = time.monotonic()
            except HTTPError as error:
                if time.monotonic() - since_answer > PATIENCE_SECONDS:
                    raise RuntimeError(f"{call.name}: the Prefect server has not answered for ten minutes: {error}") from error
                time.sleep(POLL_SECONDS)
                continue
            if state.is_final():
                return state
            if taken or manned:
                since_worker = time.monotonic()
            elif time.monotonic() - since_worker > call.launch.worker_timeout:
                _cancel(child.id)
                raise InputError(
                    f"{call.name}: no worker of the pool {pool} has answered for {call.launch.worker_timeout} s: start one by "
                    f"`posttrain up --workers {pool}`, or run the step here with --set pools={{}}"
                )
            note = f"{pool}: {state.name}" if taken or manned else f"{pool}: waits for a worker"
            if note != said:
                display.current.note(call.name, note)
                said = note
            time.sleep(POLL_SECONDS)
    except BaseException:
        # A signal ends a pipeline that is cancelled, but one, too, whose worker stops: then the child goes on.
        if ours and _cancelled():
            _cancel(child.id)
        raise


def _look(client: SyncPrefectClient, child: UUID, pool: str) -> tuple[State, bool, bool]:
    """The child's state, whether a worker has taken it, and whether the pool has a worker that answers."""
    state = client.read_flow_run(child).state
    assert state is not None
    taken = state.type != StateType.SCHEDULED
    return state, taken, taken or client.read_work_pool(pool).status == WorkPoolStatus.READY


def _cancelled() -> bool:
    """Whether this process's own flow run is being cancelled."""
    own = flow_run.id
    if own is None:
        return False
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(str(own))).state
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


def _cancel(child: UUID) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(child, Cancelling(timestamp=datetime.now(UTC)))
