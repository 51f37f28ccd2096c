"""One step: find it by key, else resume it or run it, then publish it. All of it under the key's lease."""

from __future__ import annotations

import shutil
import time
from typing import Any, Literal

from prefect import task
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from stages.artifacts import Handle
from stages.request import InputFolder, Request
from stages.run import Event
from stages.specs import STAGES, Config, StageSpec
from tasks import display
from tasks.home import configure_environment
from tasks.launch import Launch, launch
from tasks.lease import held, lease
from tasks.record import Recorder
from tasks.store import Published, Store

Status = Literal["ran", "resumed", "skipped"]


class StepCall(BaseModel):
    """A step with all its inputs known. This is what travels through Prefect."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    name: str
    stage: str
    config: dict[str, Any]
    inputs: dict[str, Handle]
    pipeline: str
    launch: Launch = Launch()
    recompute: bool = False

    def spec(self) -> StageSpec:
        return STAGES[self.stage]

    def parsed(self) -> Config:
        return self.spec().config.model_validate(self.config)

    def identity(self) -> dict[str, Any]:
        return self.spec().identity(self.parsed(), self.digests())

    def key(self) -> str:
        return self.spec().key(self.parsed(), self.digests())

    def digests(self) -> dict[str, str]:
        return {port: given.digest for port, given in self.inputs.items()}


class StepResult(BaseModel):
    """What a step came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    stage: str
    status: Status
    seconds: float
    reason: str
    run_id: str
    metrics: dict[str, float]
    artifacts: dict[str, Handle]


class Plan(BaseModel):
    """What a step would do now, and why."""

    action: Literal["skip", "resume", "run"]
    reason: str
    outputs: dict[str, Handle] = {}


@task(task_run_name="{call.name}", persist_result=False)
def execute(call: StepCall) -> StepResult:
    """Bring a step to its published outputs: skip, resume or run it."""
    started = time.monotonic()
    root = configure_environment()
    store, key = Store(root), call.key()
    display.current.begin(call.name, "")

    def waiting(owner: str) -> None:
        _say(f"{call.name}: another run computes this right now; waiting for it ({owner})")

    with lease(root / "leases", key, waiting):
        plan = examine(store, call, lease_is_ours=True)
        if plan.action == "skip":
            status, published = "skipped", store.find(key)[0]
        else:
            status, published = _compute(store, call, key)
    if published is None:
        raise RuntimeError(f"{call.name}: published under {key[:12]}, yet not found")
    result = StepResult(
        name=call.name,
        stage=call.stage,
        status=status,
        seconds=round(time.monotonic() - started, 2),
        reason=plan.reason,
        run_id=published.run_id,
        metrics=published.metrics,
        artifacts=published.outputs,
    )
    display.current.end(call.name, f"{status}  {headline(call.spec(), result.metrics)}")
    _say(
        f"{call.name}: {status} in {result.seconds:.1f} s ({plan.reason}) -> {', '.join(map(str, published.outputs.values()))}"
    )
    return result


def _compute(store: Store, call: StepCall, key: str) -> tuple[Status, Published | None]:
    """Run or resume the stage in its MLflow run's folder, and publish."""
    tags = {"key": key, "stage": call.stage, "step": call.name, "recipe": call.recipe, "pipeline": call.pipeline}
    unfinished = None if call.recompute else store.unfinished(key)
    if unfinished is None:
        run_id = store.begin(call.recipe, call.name, tags, call.identity())
    else:
        run_id = unfinished.info.run_id
        store.reopen(run_id)
    folder = store.root / "runs" / run_id
    resumed = (folder / "state").is_dir() or (folder / "outputs.json").is_file()
    request = Request(
        stage=call.stage,
        config=call.parsed().model_dump(mode="json"),
        inputs={port: InputFolder(path=store.locate(given), digest=given.digest) for port, given in call.inputs.items()},
        folder=folder,
        key=key,
    )
    recorder = Recorder(store, run_id)

    def listener(event: Event) -> None:
        recorder(event)
        display.current.event(call.name, event)

    try:
        # A folder that says it is done was killed while it was being published.
        if not (folder / "outputs.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            launch(request, call.launch, listener)
        recorder.flush()
        made = made_outputs(folder, call.spec())
        store.publish(
            run_id,
            folder,
            made,
            {
                output: f"{call.recipe}-{call.name}" if kind == "model" else f"{call.recipe}-{call.name}-{output}"
                for output, kind in made.items()
            },
            call.inputs,
        )
    except BaseException:
        recorder.flush()
        store.fail(run_id)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return "resumed" if resumed else "ran", store.find(key)[0]


def made_outputs(folder: Any, spec: StageSpec) -> dict[str, Any]:
    """The outputs that a finished stage declares to have made, by kind."""
    import json

    made = json.loads((folder / "outputs.json").read_text())["outputs"]
    return {output: spec.outputs[output] for output in made}


def examine(store: Store, call: StepCall, lease_is_ours: bool = False) -> Plan:
    """What the step would do now: skip, resume or run, and which input or field makes it so."""
    key = call.key()
    if call.recompute:
        return Plan(action="run", reason="asked for by --from")
    published, damage = store.find(key)
    if published is not None:
        return Plan(action="skip", reason="same config and inputs", outputs=published.outputs)
    unfinished = store.unfinished(key)
    if unfinished is not None and (store.root / "runs" / unfinished.info.run_id / "state").is_dir():
        running = not lease_is_ours and held(store.root / "leases", key)
        return Plan(
            action="resume", reason="runs right now elsewhere" if running else "was interrupted; a saved state is there"
        )
    return Plan(action="run", reason=damage or difference(store, call))


def difference(store: Store, call: StepCall) -> str:
    """In words, what makes this step another than the newest one of its name that completed."""
    for run in store.runs(step=call.name, recipe=call.recipe):
        before = store.identity(run)
        if before is not None and "posttrain.outputs" in run.data.tags:
            changes = compare(before, call.identity())
            return (
                "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
                if changes
                else "recomputed"
            )
    return "never ran"


def compare(before: Any, after: Any, path: str = "") -> list[str]:
    """Differences of two identities, leaf by leaf: `optimizer.lr 0.001 -> 0.002`, `input train changed`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [text for name in names for text in compare(before.get(name), after.get(name), f"{path}.{name}".lstrip("."))]
    if before == after:
        return []
    if path.startswith("inputs."):
        return [f"input {path.removeprefix('inputs.')} changed"]
    return [f"{path.removeprefix('config.')} {before} -> {after}"]


def headline(spec: StageSpec, metrics: dict[str, float]) -> str:
    """The numbers of a step that a person looks at first."""
    return "  ".join(f"{name} {metrics[name]:.3g}" for name in spec.headline if name in metrics)


def _say(text: str) -> None:
    """A line in the flow run's log, where there is a flow run."""
    try:
        get_run_logger().info(text)
    except MissingContextError:
        return
