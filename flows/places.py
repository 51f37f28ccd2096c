"""Artifacts in the place of steps, as `inputs` gives them: a pipeline is entered there, and what only led there is not run."""

from __future__ import annotations

from typing import Any

from flows.recipe import Recipe
from stages.specs.prepare import PrepareConfig
from tasks.pipeline import Outputs, Pipeline, Source


def given(pipeline: Pipeline, recipe: Recipe, step: str, stage: str | None = None) -> Outputs | None:
    """What is given in a step's place, or None; `stage` for a step that is no field of the recipe."""
    return pipeline.given(step, stage or recipe.stage(step), recipe.in_place(step, stage))


def made(pipeline: Pipeline, recipe: Recipe, step: str, **sources: Source) -> Outputs:
    """What is given in a step's place, else what the step makes of its sources."""
    if (found := given(pipeline, recipe, step)) is not None:
        return found
    return pipeline.step(step, recipe.stage(step), getattr(recipe, step), **sources)


def dataset(
    pipeline: Pipeline, recipe: Recipe, step: str, *instead: str, exclude: Source = None, default: PrepareConfig | None = None
) -> Outputs:
    """What is given in the place of a step that prepares the input of its name, or one `instead`; else what it makes. `default`
    is its config when the recipe has none."""
    if (found := given(pipeline, recipe, step)) is not None:
        return found
    config: Any = getattr(recipe, step) or default
    return pipeline.step(step, "prepare", config, source=pipeline.input(step, *instead), exclude=exclude)
