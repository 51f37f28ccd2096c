"""A pipeline: steps by name over one store, either run through Prefect or only planned.

A flow's body is the same in both cases: it calls `pipeline.step(...)` and passes outputs on. When planning, the outputs of a
step that would run are `Pending`, and what depends on them would run too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

from mlflow.entities import Param, RunTag
from prefect.client.schemas.objects import State, StateDetails
from prefect.states import Completed
from prefect.utilities.annotations import quote

from stages.artifacts import Dataset, Kind, Model, handle
from stages.errors import InputError
from stages.specs import STAGES, Config
from tasks.entries import PIPELINE
from tasks.execute import StepResult, execute
from tasks.launch import Launch
from tasks.plan import Plan, StepCall, examine
from tasks.references import resolve
from tasks.store import Store


@dataclass(frozen=True)
class Pending:
    """An output that is not known before its step has run."""

    step: str
    output: str


Source = Dataset | Model | Pending | None


@dataclass(frozen=True)
class Outputs:
    """A step's outputs by name; None for an optional one that the step did not make."""

    step: str
    known: Mapping[str, Dataset | Model] | None

    def __getitem__(self, output: str) -> Source:
        return Pending(self.step, output) if self.known is None else self.known.get(output)


@dataclass
class Pipeline:
    """Runs or plans steps in order, and remembers what came of each."""

    recipe: str
    store: Store
    inputs: Mapping[str, Dataset | Model]
    pipeline_id: str
    launch: Launch = field(default_factory=Launch)
    pool_of: Callable[[str], str | None] = lambda _: None
    tell: Callable[[Sequence[StepResult]], None] = lambda _: None
    only_plan: bool = False
    from_step: str | None = None
    results: list[StepResult] = field(default_factory=list)
    plans: list[tuple[str, str, Plan]] = field(default_factory=list)
    _redone: set[str] = field(default_factory=set)
    _makers: dict[str, str] = field(default_factory=dict)

    def input(self, name: str, *instead: str) -> Dataset | Model:
        """A resolved input of the recipe, or one that may stand for it. Raises InputError when the recipe gives none."""
        given = next((self.inputs[one] for one in (name, *instead) if one in self.inputs), None)
        if given is None:
            others = "".join(f", nor inputs.{one} in its place" for one in instead)
            raise InputError(f"inputs.{name} is needed by this recipe's steps and is not given{others}")
        return given

    def given(self, name: str, stage: str, inputs: Mapping[str, str]) -> Outputs | None:
        """What inputs, by the outputs that they stand for, give in the place of a step, which is then not run; None if none is.

        An output that is not given is one that the step did not make. Raises InputError when the step is to be computed again.
        """
        if not inputs:
            return None
        known = {output: self.inputs[one] for output, one in inputs.items()}
        if name == self.from_step:
            raise InputError(
                f"--from {name}: inputs.{next(iter(inputs.values()))} is given in this step's place, so it is not computed; "
                "leave the input out, or name a step that follows"
            )
        reason = ", ".join(f"inputs.{one} is {self.inputs[one]}" for one in inputs.values())
        if self.only_plan:
            self.plans.append((name, stage, Plan(action="given", reason=reason, outputs=known)))
        else:
            maker, _ = self.store.maker(next(iter(known.values())))
            found = {"run_id": maker.info.run_id, "metrics": {}, "artifacts": known}
            self._ended(StepResult(name=name, stage=stage, status="given", seconds=0, reason=reason, **found))
        return Outputs(name, known)

    def step(self, name: str, stage: str, config: Config, **sources: Source) -> Outputs:
        """Run or plan one step; inputs that are None are left out. Raises InputError when a required one is missing."""
        spec = STAGES[stage]
        given = {port: source for port, source in sources.items() if source is not None}
        for port, needed in spec.inputs.items():
            if needed.required and port not in given:
                raise InputError(
                    f"step {name}: the stage {stage} needs the input {port}, which nothing gives it; an output without rows "
                    "counts as nothing"
                )
        redo = name == self.from_step or any(_step_of(source) in self._redone for source in given.values())
        if redo:
            self._redone.add(name)
        waiting = next((source for source in given.values() if isinstance(source, Pending)), None)
        if waiting is not None:
            reason = f"its input comes from the step {waiting.step}, which runs"
            self.plans.append((name, stage, Plan(action="run", reason=reason)))
            return Outputs(name, None)
        call = StepCall(
            recipe=self.recipe,
            name=name,
            stage=stage,
            config=config.model_dump(mode="json"),
            inputs={port: source for port, source in given.items() if not isinstance(source, Pending)},
            pipeline=self.pipeline_id,
            launch=self.launch,
            pool=self.pool_of(stage),
            recompute=redo,
        )
        if self.only_plan:
            plan = examine(self.store, call)
            self.plans.append((name, stage, plan))
            return Outputs(name, plan.outputs if plan.action == "skip" else None)
        made_by = {self._makers[given.uri] for given in call.inputs.values() if given.uri in self._makers}
        # Unquoted, Prefect guesses where a call comes from by addresses of objects in memory, and draws arrows that are wrong.
        result = execute.with_options(retries=self.launch.retries)(
            cast(StepCall, quote(call)), wait_for=[_completed(task_run) for task_run in sorted(made_by)]
        )
        self._ended(result)
        self._makers |= {made.uri: result.task_run for made in result.artifacts.values() if result.task_run}
        if redo:
            self._redone |= {made.uri for made in result.artifacts.values()}
        return Outputs(name, result.artifacts)

    def _ended(self, result: StepResult) -> None:
        self.results.append(result)
        self.tell(self.results)

    def check_from_step(self) -> None:
        """Raise InputError when `from_step` named no step of this pipeline."""
        names = [name for name, _, _ in self.plans]
        if self.from_step is not None and self.from_step not in names:
            raise InputError(f"--from {self.from_step}: no step has this name; there are {', '.join(names)}")


def _completed(task_run: str) -> State[Any]:
    """What Prefect takes as a step to wait for."""
    return Completed(data=True, state_details=StateDetails(task_run_id=UUID(task_run)))


def _step_of(source: Source) -> str | None:
    if isinstance(source, Pending):
        return source.step
    return source.uri if source is not None else None


def resolve_inputs(
    store: Store, recipe: str, references: Mapping[str, tuple[str, Kind]], pipeline_id: str | None
) -> dict[str, Dataset | Model]:
    """Handles of a recipe's inputs. With a pipeline id the resolution is kept, so that a retry sees what the first try saw."""
    kept = store.runs(pipeline_inputs=pipeline_id) if pipeline_id else []
    if kept:
        text = kept[0].data.tags["posttrain.resolution"]
        return {name: handle(fields.pop("kind"), **fields) for name, fields in json.loads(text).items()}
    resolved = resolve_each(store, references, publish=pipeline_id is not None)
    if pipeline_id:
        run = store.client.create_run(store.experiment(recipe), run_name="pipeline", tags={PIPELINE: pipeline_id})
        text = json.dumps({name: given.model_dump() for name, given in resolved.items()})
        tags = [RunTag("posttrain.resolution", text), RunTag("posttrain.pipeline_inputs", pipeline_id)]
        params = [Param(name, str(given)) for name, given in resolved.items()]
        store.client.log_batch(run.info.run_id, params=params, tags=tags)
        store.client.set_terminated(run.info.run_id)
    return resolved


def resolve_each(store: Store, references: Mapping[str, tuple[str, Kind]], publish: bool) -> dict[str, Dataset | Model]:
    """Handles of a recipe's inputs as they are now."""
    resolved: dict[str, Dataset | Model] = {}
    for name, (reference, kind) in references.items():
        try:
            resolved[name] = resolve(store, reference, kind, publish=publish)
        except InputError as error:
            raise InputError(f"inputs.{name}: {error}") from error
    return resolved
