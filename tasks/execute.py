"""One step: find it by key, else resume it or run it, then publish it. All of it under the key's lease."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from pydantic import BaseModel, ConfigDict

from stages.artifacts import Handle, Kind
from stages.data.questions import PAGE
from stages.errors import InputError
from stages.request import InputFolder, Request
from stages.run import Event
from stages.specs import StageSpec
from tasks import display
from tasks.dispatch import dispatch
from tasks.entries import STATUS, Published, Status
from tasks.home import configure_environment, server
from tasks.launch import launch
from tasks.lease import Held, LeaseLostError, lease
from tasks.live import link
from tasks.plan import StepCall, examine, has_progress, unfinished_run
from tasks.plots import rl_curves
from tasks.preference_plots import preference_curves
from tasks.record import Recorder
from tasks.states import States
from tasks.store import Store


class StepResult(BaseModel):
    """What a step came to. One in whose place artifacts are given has these and the run that made the first, and no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    stage: str
    status: Status | Literal["given"]
    seconds: float
    reason: str
    run_id: str
    metrics: dict[str, float]
    headline: str = ""
    artifacts: dict[str, Handle]
    plot: str | None = None
    page: str | None = None
    task_run: str | None = None


@task(task_run_name="{call.name}", persist_result=False)
def execute(call: StepCall) -> StepResult:
    """Bring a step to its published outputs: here, or by a worker of its pool."""
    started, store = time.monotonic(), Store(configure_environment())
    published, status, reason = bring(call) if call.pool is None else _from_pool(store, call, call.pool)
    plot = _plot(store, published) if "checkpoint" in published.outputs else None
    return StepResult(
        name=call.name,
        stage=call.stage,
        status=status,
        seconds=round(time.monotonic() - started, 2),
        reason=reason,
        run_id=published.run_id,
        metrics=published.metrics,
        headline=headline(call.spec(), published.metrics),
        artifacts=published.outputs,
        plot=None if plot is None else str(plot),
        page=_page(store, published),
        task_run=task_run.id,
    )


Brought = tuple[Published, Status, str]


def _from_pool(store: Store, call: StepCall, pool: str) -> Brought:
    """What a worker publishes, found by its key; what is there already needs none."""
    key = call.key()
    display.current.begin(call.name, "")
    plan = examine(store, call)
    if plan.action != "skip":
        dispatch(call, key, pool)
    published, damage = store.find(key)
    if published is None:
        raise RuntimeError(f"{call.name}: its flow run on the pool {pool} ended well, yet nothing is published ({damage})")
    # Another pipeline's child may have computed it for us.
    ours = plan.action != "skip" and published.pipeline == call.pipeline
    status: Status = published.status if ours else "skipped"
    display.current.end(call.name, f"{status}  {headline(call.spec(), published.metrics)}")
    return published, status, plan.reason


def bring(call: StepCall) -> Brought:
    """Skip, resume or run a step in this process, or in children of it: its publication, what was done and why."""
    started, root = time.monotonic(), configure_environment()
    store, key = Store(root), call.key()
    display.current.begin(call.name, "")

    def waiting(owner: str) -> None:
        _say(f"{call.name}: another process computes the same right now; waiting for it ({owner})")

    with lease(root / "leases", key, waiting) as held:
        plan = examine(store, call, lease_is_ours=True)
        status: Status = "skipped" if plan.action == "skip" else _compute(store, call, key, held)
        published, damage = store.find(key)
    if published is None:
        raise RuntimeError(f"{call.name}: it was published, yet its artifacts cannot be found ({damage})")
    seconds = time.monotonic() - started
    display.current.end(call.name, f"{status}  {headline(call.spec(), published.metrics)}")
    _say(f"{call.name}: {status} in {seconds:.1f} s ({plan.reason}) -> {', '.join(map(str, published.outputs.values()))}")
    return published, status, plan.reason


def _plot(store: Store, published: Published) -> Path | None:
    """What a person looks at after a policy was trained by rewards or preferences."""
    # What was found by its key may be another recipe's.
    named = str(published.outputs["checkpoint"]).replace("/", "-")
    path = store.root / "plots" / f"{named}.png"
    if {"reward", "length"} <= published.metrics.keys():
        return rl_curves(store, published.run_id, named, path)
    if {"reward_margin", "chosen_logp"} <= published.metrics.keys():
        return preference_curves(store, published.run_id, named, path)
    return None


def _page(store: Store, published: Published) -> str | None:
    """The page on which people answer questions, where a step made one."""
    pages = (store.locate(made) / PAGE for name, made in published.outputs.items() if name == "questions")
    return next((str(page) for page in pages if page.is_file()), None)


def _compute(store: Store, call: StepCall, key: str, held: Held) -> Status:
    """Run the stage in its MLflow run's folder, or go on with an unfinished run of the same key; then publish."""
    unfinished = unfinished_run(store, call)
    if unfinished is None:
        tags = {"key": key, "stage": call.stage, "step": call.name, "recipe": call.recipe, "pipeline": call.pipeline}
        run_id = store.begin(call.recipe, call.name, tags, call.identity())
    else:
        run_id = unfinished.info.run_id
        store.reopen(run_id)
    status: Status = "resumed" if has_progress(store, run_id) else "ran"
    folder = store.root / "runs" / run_id
    if server() is not None and flow_run.id is not None:
        link(store, run_id, call.name)
    recorder, states = Recorder(store, run_id), States(store, run_id, folder)

    def listener(event: Event) -> None:
        recorder(event)
        if event["event"] == "state":
            states.send()
        display.current.event(call.name, event)

    try:
        # A folder that says it is done belongs to a try that was killed while it published.
        if not (folder / "outputs.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            states.fetch()
            launch(_request(store, call, key, folder), call.launch, listener)
        recorder.flush()
        made = made_outputs(folder, call.spec())
        if not held.check() and store.is_complete(run_id):
            # Another machine had it for a while, and went on with this run to its end.
            shutil.rmtree(folder)
            return "skipped"
        store.client.set_tag(run_id, STATUS, status)
        store.publish(run_id, folder, made, {output: call.registered_name(output) for output in made}, call.inputs)
        states.forget()
    except LeaseLostError:
        # The run may be another's by now.
        raise
    except BaseException as error:
        recorder.flush()
        store.fail(run_id)
        if not has_progress(store, run_id):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, InputError):
            raise InputError(f"{call.name}: {error}") from error
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return status


def _request(store: Store, call: StepCall, key: str, folder: Path) -> Request:
    inputs = {port: InputFolder(path=store.locate(given), digest=given.digest) for port, given in call.inputs.items()}
    return Request(stage=call.stage, config=call.parsed().model_dump(mode="json"), inputs=inputs, folder=folder, key=key)


def made_outputs(folder: Path, spec: StageSpec) -> dict[str, Kind]:
    """The outputs that a finished stage says it made, by kind."""
    made = json.loads((folder / "outputs.json").read_text())["outputs"]
    return {output: spec.outputs[output] for output in made}


def headline(spec: StageSpec, metrics: dict[str, float]) -> str:
    """The numbers of a step that a person looks at first; `before -> after` where the stage measured both."""

    def spelled(name: str) -> str:
        before = f"{number(metrics[name + '_before'])} -> " if f"{name}_before" in metrics else ""
        return f"{name} {before}{number(metrics[name])}"

    return "  ".join(spelled(name) for name in headline_names(spec, metrics))


def headline_names(spec: StageSpec, metrics: Mapping[str, float]) -> list[str]:
    """The metrics that a stage's headline names; `NAME.*` stands for all that begin so, but for their bounds and counts."""
    marks = ("_low", "_high", "_before", "_missing")
    found: list[str] = []
    for name in spec.headline:
        if name.endswith("*"):
            found += sorted(one for one in metrics if one.startswith(name[:-1]) and not one.endswith(marks))
        elif name in metrics:
            found.append(name)
    return found


def number(value: float) -> str:
    """Counts whole, the rest with three digits."""
    return f"{value:.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.3g}"


def _say(text: str) -> None:
    """A line in the flow run's log, where there is a flow run."""
    try:
        get_run_logger().info(text)
    except MissingContextError:
        return
