"""A pipeline that notes its steps and runs nothing: what the tests of flows share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.recipe import Recipe
from stages.artifacts import handle
from stages.specs import Config
from tasks.pipeline import Outputs, Pending, Pipeline, Source


class Seen(Pipeline):
    """Notes every step's stage, config and where its inputs come from, and runs nothing."""

    def __init__(self, inputs: Any) -> None:
        store: Any = None
        super().__init__("r1", store, inputs, "", only_plan=True)
        self.read: dict[str, dict[str, str]] = {}
        self.made: dict[str, tuple[str, Any]] = {}

    def step(self, name: str, stage: str, config: Config, **sources: Source) -> Outputs:
        assert name not in self.read
        self.read[name] = {port: _named(source) for port, source in sources.items() if source is not None}
        self.made[name] = (stage, config)
        return Outputs(name, None)


def _named(source: Any) -> str:
    return f"{source.step}.{source.output}" if isinstance(source, Pending) else source.name


def noted(recipe: Recipe, steps: Callable[[Pipeline, Any], None]) -> Seen:
    """The steps of a recipe; each of its inputs is a handle of the input's name."""
    kinds: dict[str, Any] = {name: kind for name, (_, kind) in recipe.references().items()}
    pipeline = Seen({n: handle(k, name=n, version="1", digest=n, uri=f"models:/{n}/1") for n, k in kinds.items()})
    steps(pipeline, recipe)
    return pipeline
