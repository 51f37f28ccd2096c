"""Rounds of a recipe, each a record: an MLflow run whose tag `posttrain.round` holds all that a retry must see again.

The record is written before the round's first step, and changed only by `pin`, `wait`, `decide` and `end`, by one tag each
time. Its run's id is the pipeline of the round's steps, whichever Prefect flow run computes them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from mlflow.entities import Metric, Param, RunTag
from pydantic import BaseModel, ConfigDict

from stages.artifacts import Dataset, Handle, Kind, Model, digest_of
from tasks.exclusive import or_busy
from tasks.lease import Waiting
from tasks.pipeline import resolve_each
from tasks.promote import champion
from tasks.references import resolve
from tasks.store import Store

RECORD, OF, STATE = "posttrain.round", "posttrain.rounds", "posttrain.round_state"

State = Literal["running", "awaiting_labels", "promoted", "kept"]


class Outcome(BaseModel):
    """What a round came to before its end: the verdict, what it made, and the numbers that its table shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    reasons: list[str]
    candidate: Model
    made: dict[str, Handle]
    main: str
    figures: dict[str, float]


class Round(BaseModel):
    """A round's record.

    `champion` is the registered model whose alias it may move, and `champion_version` where that stood when the round began.
    `inputs` are what its steps read: `champion` and `first` (the model that the first round began with; both missing only until
    the first round has made it), what the recipe names, and what the last round left (`train`, `heldout`, `last_reward_model`).
    `start` and `count` are its slice of the stream of prompts, which `stream` identifies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    number: int
    id: str = ""
    state: State = "running"
    champion: str
    champion_version: str | None
    inputs: dict[str, Handle]
    stream: str
    start: int
    count: int
    outcome: Outcome | None = None
    version: str | None = None
    why: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ("promoted", "kept")


def alone(store: Store, recipe: str, waiting: Waiting = lambda _: None) -> AbstractContextManager[None]:
    """Be the only one who runs rounds of a recipe. Raises BusyError when somebody does; `waiting` as in `or_busy`."""
    return or_busy(store, digest_of(["rounds", recipe]), waiting)


class Rounds:
    """All rounds of a recipe. Only who is `alone` may write."""

    def __init__(self, store: Store, recipe: str) -> None:
        self.store, self.recipe = store, recipe

    def all(self) -> list[Round]:
        """The rounds in order."""
        return sorted(
            (_read(run.data.tags[RECORD], run.info.run_id) for run in self.store.runs(rounds=self.recipe)),
            key=lambda one: one.number,
        )

    def last(self) -> Round | None:
        """The newest round."""
        return next(reversed(self.all()), None)

    def draft(
        self,
        name: str,
        references: Mapping[str, tuple[str, Kind]],
        stream: Mapping[str, Any],
        count: int,
        publish: bool = True,
    ) -> Round:
        """The round after the last one, not written yet: its inputs resolved, its slice after all earlier ones.

        `name` is the champion's; `stream` is what decides the stream besides the prompts' content: another stream begins at 0.
        """
        last, version = self.last(), champion(self.store, name)
        # The first model and preferences are for the beginning.
        unneeded = ({"model", "preferences"} if last else set()) | ({"model"} if version else set())
        wanted = {port: reference for port, reference in references.items() if port not in unneeded}
        inputs = resolve_each(self.store, wanted, publish)
        if version is not None:
            inputs["champion"] = resolve(self.store, f"models:/{name}/{version}", "model")
            inputs["first"] = inputs["champion"]
        if last is not None:
            inputs["first"] = last.inputs["first"]
            inputs.setdefault("champion", inputs["first"])
            inputs |= last.outcome.made if last.outcome else {}
        source = inputs["prompts"].digest if "prompts" in inputs else None
        identity = digest_of({"prompts": source, **stream})
        start = last.start + last.count if last and last.stream == identity else 0
        number = last.number + 1 if last else 1
        fields = {"stream": identity, "start": start, "count": count, "champion": name, "champion_version": version}
        return Round(recipe=self.recipe, number=number, inputs=inputs, **fields)

    def begin(self, draft: Round) -> Round:
        """Write a new round's record, whole from the first moment."""
        client, name = self.store.client, f"round {draft.number}"
        tags = {RECORD: draft.model_dump_json(exclude={"id"}), OF: self.recipe, STATE: draft.state}
        run = client.create_run(self.store.experiment(self.recipe), run_name=name, tags=tags)
        shown = {port: str(given) for port, given in draft.inputs.items()} | {"start": draft.start, "count": draft.count}
        client.log_batch(run.info.run_id, params=[Param(port, str(value)) for port, value in shown.items()])
        return draft.model_copy(update={"id": run.info.run_id})

    def go_on(self, one: Round) -> Round:
        """Mark a round as running again."""
        self.store.reopen(one.id)
        return self._write(one, state="running")

    def pin(self, one: Round, **inputs: Dataset | Model) -> Round:
        """Add inputs that were not known when the round began."""
        return self._write(one, inputs={**one.inputs, **inputs})

    def wait(self, one: Round) -> Round:
        """The round waits for people's labels, and nobody works at it."""
        self.store.client.update_run(one.id, status="SCHEDULED")
        return self._write(one, state="awaiting_labels")

    def decide(self, one: Round, outcome: Outcome) -> Round:
        """What the round came to. From here on it is not judged again, whatever becomes of its recipe."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, one.number) for name, value in outcome.figures.items()]
        self.store.client.log_batch(one.id, metrics=metrics)
        return self._write(one, outcome=outcome)

    def end(self, one: Round, state: State, why: str, version: str | None = None) -> Round:
        """The round is over."""
        ended = self._write(one, state=state, why=why, version=version)
        self.store.client.set_terminated(one.id)
        return ended

    def _write(self, one: Round, **changes: Any) -> Round:
        changed = one.model_copy(update=changes)
        tags = [RunTag(STATE, changed.state), RunTag(RECORD, changed.model_dump_json(exclude={"id"}))]
        self.store.client.log_batch(one.id, tags=tags)
        return changed


def _read(text: str, run_id: str) -> Round:
    return Round.model_validate_json(text).model_copy(update={"id": run_id})
