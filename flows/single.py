"""One flow a stage, so that any stage can be triggered or resumed by itself from saved artifacts.

Each is made from its stage's spec: a recipe whose inputs are the stage's ports and whose one step is named as the stage. A key
knows no step or recipe: what a pipeline computed from the same config and inputs is skipped here, and the other way round.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from prefect import Flow
from pydantic import Field, create_model

from flows.forms import recipe_flow
from flows.inputs import Inputs, reference
from flows.recipe import Recipe
from flows.runner import Definition, run_pipeline
from stages.specs import STAGES, Port, StageSpec
from tasks.execute import StepResult
from tasks.pipeline import Pipeline


class StageRecipe(Recipe):
    """What the recipes of single stages share."""

    SPEC: ClassVar[StageSpec]


def steps(pipeline: Pipeline, recipe: StageRecipe) -> None:
    """The one step."""
    name = recipe.SPEC.name
    pipeline.step(name, name, getattr(recipe, name), **pipeline.inputs)


def recipe_of(spec: StageSpec) -> type[StageRecipe]:
    """A recipe's class with the stage's config under the stage's name, and under `inputs` one reference a port."""
    title = spec.name.replace("_", " ").capitalize()
    needed = ", ".join(name for name, port in spec.inputs.items() if port.required)
    ports: dict[str, Any] = {name: _port(name, port) for name, port in spec.inputs.items()}
    inputs = create_model(f"{title} inputs", __base__=Inputs, __doc__="What the stage reads.", **ports)
    fields: dict[str, Any] = {
        "inputs": (inputs, Field(title="Inputs", description=f"References, of {needed} at least.")),
        spec.name: (spec.config, Field(title=title, description="The stage's config.")),
    }
    made = create_model(f"{title} recipe", __base__=StageRecipe, __doc__=f"The stage {spec.name} by itself.", **fields)
    made.SPEC = spec
    return made


def _port(name: str, port: Port) -> Any:
    return str if port.required else str | None, reference(port.kind, name, required=port.required)


def flow_of(kind: type[StageRecipe]) -> Flow[..., list[StepResult]]:
    """The Prefect flow of a stage's recipe."""

    def run(recipe: StageRecipe, from_step: str | None = None) -> list[StepResult]:
        """Run one stage; `from_step`, the stage's name, computes it again though it is there."""
        return run_pipeline(recipe, steps, from_step)

    # The form is made of the annotations.
    run.__annotations__["recipe"] = kind
    run.__name__ = run.__qualname__ = kind.SPEC.name
    return recipe_flow(run)


@functools.cache
def definition(stage: str) -> Definition:
    """The recipe, flow and step of a stage."""
    kind = recipe_of(STAGES[stage])
    return Definition(kind, flow_of(kind), steps)


def __getattr__(name: str) -> Flow[..., list[StepResult]]:
    """A worker finds a stage's flow as `flows.single.STAGE`."""
    if name not in STAGES:
        raise AttributeError(f"flows.single has no {name!r}; its flows are {', '.join(STAGES)}")
    return definition(name).flow
