"""A recipe as the parameters of a Prefect flow: what its form asks for, what a schedule submits, what a run accepts."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from prefect import Flow, flow
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows.recipe import Recipe, parse
from stages.errors import InputError
from stages.specs.texts import FORM
from tasks.execute import StepResult

FROM_STEP = "Compute this step and what follows from it again, though they are there; empty: nothing that is there."


def parameters(recipe: Recipe, from_step: str | None = None) -> dict[str, Any]:
    """What a deployment of the recipe's flow takes, as the form would send it: schedules and commands submit this."""
    said = {"recipe": recipe.model_dump(mode="json", context=FORM)}
    return said | {"from_step": from_step} if from_step else said


def recipe_flow(run: Callable[..., list[StepResult]]) -> Flow[..., list[StepResult]]:
    """Decorates a function of a recipe and `from_step` as the Prefect flow of its name.

    Prefect draws its form by the signature, but does not validate by it: a recipe or reference that is wrong ends the run at
    once, with the words in which the command would refuse it as its state's message.
    """
    kind: type[Recipe] = typing.get_type_hints(run)["recipe"]

    @functools.wraps(run)
    def body(recipe: Any, from_step: str | None = None) -> Any:
        if isinstance(recipe, kind):
            return run(recipe, from_step or None)
        try:
            return run(parse(kind, recipe, "recipe"), from_step or None)
        except InputError as error:
            # Raised, it would stand behind Prefect's own words and a traceback.
            return Failed(message=str(error))

    shown = {
        "recipe": (kind, Field(description=inspect.getdoc(kind), json_schema_extra={"title": "Recipe"})),
        "from_step": (str, Field(default="", description=FROM_STEP, json_schema_extra={"title": "From step"})),
    }
    fields = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=field)
        for name, (annotation, field) in shown.items()
    ]
    vars(body)["__signature__"] = inspect.Signature(fields)
    return flow(name=run.__name__, flow_run_name=_run_name, persist_result=False, validate_parameters=False)(body)


def _run_name() -> str:
    """The recipe's name, or, where it has none that can be read, that which the run has."""
    recipe = flow_run.parameters.get("recipe")
    given = recipe.name if isinstance(recipe, Recipe) else recipe.get("name") if isinstance(recipe, dict) else None
    return str(given or flow_run.name)
