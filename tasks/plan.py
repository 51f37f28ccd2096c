"""What a step would do now, and why: skip, resume or run; or nothing, since what it makes is given."""

from __future__ import annotations

from typing import Any, Literal

from mlflow.entities import Run
from pydantic import BaseModel, ConfigDict

from stages.artifacts import Handle
from stages.specs import STAGES, Config, StageSpec
from tasks.entries import OUTPUTS, PIPELINE
from tasks.launch import Launch
from tasks.lease import held
from tasks.states import kept
from tasks.store import Store


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
    pool: str | None = None
    recompute: bool = False

    def spec(self) -> StageSpec:
        return STAGES[self.stage]

    def parsed(self) -> Config:
        return self.spec().config.model_validate(self.config)

    def digests(self) -> dict[str, str]:
        return {port: given.digest for port, given in self.inputs.items()}

    def identity(self) -> dict[str, Any]:
        return self.spec().identity(self.parsed(), self.digests())

    def key(self) -> str:
        return self.spec().key(self.parsed(), self.digests())

    def may_use(self, pipeline: str) -> bool:
        """Whether what a pipeline computed counts: any one's, but for a step that is to be computed again, whose own tries
        alone do (a retry after a crash must not begin from nothing once more)."""
        return not self.recompute or (self.pipeline != "" and pipeline == self.pipeline)

    def registered_name(self, output: str) -> str:
        """`RECIPE-STEP` for a step's checkpoint, `RECIPE-STEP-OUTPUT` for all else: both live in one registry."""
        return f"{self.recipe}-{self.name}" if output == "checkpoint" else f"{self.recipe}-{self.name}-{output}"


class Plan(BaseModel):
    """What a step would do now, and why. `outputs` are known when it would be skipped or is given."""

    action: Literal["skip", "resume", "run", "given"]
    reason: str
    outputs: dict[str, Handle] = {}


def examine(store: Store, call: StepCall, lease_is_ours: bool = False) -> Plan:
    """Look for the step's key in the store."""
    key = call.key()
    published, damage = store.find(key)
    if published is not None and call.may_use(published.pipeline):
        return Plan(action="skip", reason="same config and inputs", outputs=published.outputs)
    unfinished = unfinished_run(store, call)
    if unfinished is not None and has_progress(store, unfinished.info.run_id):
        elsewhere = not lease_is_ours and held(store.root / "leases", key)
        return Plan(
            action="resume", reason="runs right now in another process" if elsewhere else "was interrupted; its state is saved"
        )
    reason = "asked for by --from" if call.recompute else damage or difference(store, call)
    return Plan(action="run", reason=reason)


def unfinished_run(store: Store, call: StepCall) -> Run | None:
    """The run that this call goes on with: one of its key that is not complete."""
    found = store.unfinished(key=call.key())
    return found if found is not None and call.may_use(found.data.tags.get(PIPELINE, "")) else None


def has_progress(store: Store, run_id: str) -> bool:
    """Whether an unfinished run left something to go on from: a saved state, or outputs that only lack publishing."""
    folder = store.root / "runs" / run_id
    return any((folder / "state").glob("step-*")) or (folder / "outputs.json").is_file() or kept(store, run_id)


def difference(store: Store, call: StepCall) -> str:
    """In words, what makes this step another than the newest one of its name that completed."""
    for run in store.runs(step=call.name, recipe=call.recipe):
        before = store.identity(run)
        if before is None or OUTPUTS not in run.data.tags:
            continue
        changes = compare(before, call.identity())
        more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        return "; ".join(changes[:4]) + more
    return "never ran"


def compare(before: Any, after: Any, path: str = "") -> list[str]:
    """Differences of two identities, leaf by leaf: `optimizer.lr: 0.001 -> 0.002`, `input train changed`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [text for name in names for text in compare(before.get(name), after.get(name), f"{path}.{name}".lstrip("."))]
    if before == after:
        return []
    if path.startswith("inputs."):
        return [f"input {path.removeprefix('inputs.')} changed"]
    return [f"{path.removeprefix('config.')}: {before} -> {after}"]
