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
from prefect.utilities.callables import parameter_docstrings
from pydantic import Field

from flows.recipe import Recipe, parse
from stages.errors import InputError
from stages.specs.base import Config
from stages.specs.texts import FORM

FROM_STEP = "Compute this step and what follows from it again, though they are there; empty: nothing that is there."


def parameters(recipe: Recipe, from_step: str | None = None) -> dict[str, Any]:
    """What a deployment of the recipe's flow takes, as the form would send it: schedules and commands submit this."""
    said: dict[str, Any] = {"recipe": _said(recipe, recipe.model_dump(mode="json", context=FORM), None)}
    return said | {"from_step": from_step} if from_step else said


def _said(value: Any, dumped: Any, default: Any) -> Any:
    """What is dumped of a value, without what is None where nothing else was to be expected: the form's empty fields send
    nothing, and Prefect refuses null for them."""
    if isinstance(value, list):
        return [_said(one, its, None) for one, its in zip(value, dumped, strict=True)]
    if not isinstance(value, Config):
        return dumped
    said: dict[str, Any] = {}
    for name, field in type(value).model_fields.items():
        one = getattr(value, name)
        expected = getattr(default, name) if isinstance(default, type(value)) else field.get_default(call_default_factory=True)
        if one is not None or expected is not None:
            said[name] = _said(one, dumped[name], expected)
    return said


def recipe_flow(run: Callable[..., Any]) -> Flow[..., Any]:
    """Decorates a function of a recipe and of texts that may be None, such as `from_step`, as the Prefect flow of its name.

    Prefect draws its form by the signature, but does not validate by it: a recipe or reference that is wrong ends the run at
    once, with the words in which the command would refuse it as its state's message. The help of a text is what the docstring
    says under `Args:`.
    """
    kind: type[Recipe] = typing.get_type_hints(run)["recipe"]

    @functools.wraps(run)
    def body(recipe: Any, *texts: str | None, **named: str | None) -> Any:
        given = [text or None for text in texts], {name: text or None for name, text in named.items()}
        if isinstance(recipe, kind):
            return run(recipe, *given[0], **given[1])
        try:
            return run(parse(kind, recipe, "recipe"), *given[0], **given[1])
        except InputError as error:
            # Raised, it would stand behind Prefect's own words and a traceback.
            return Failed(message=str(error))

    helps = {"from_step": FROM_STEP} | parameter_docstrings(inspect.getdoc(run) or "")

    def shown(name: str) -> tuple[Any, Any]:
        title: dict[str, Any] = {"title": name.replace("_", " ").capitalize()}
        if name == "recipe":
            return kind, Field(json_schema_extra=title)
        return str, Field(default="", description=helps[name], json_schema_extra=title)

    fields = [
        parameter.replace(annotation=annotation, default=field)
        for name, parameter in inspect.signature(run).parameters.items()
        for annotation, field in (shown(name),)
    ]
    vars(body)["__signature__"] = inspect.Signature(fields)
    return flow(name=run.__name__, flow_run_name=_run_name, persist_result=False, validate_parameters=False)(body)


def _run_name() -> str:
    """The recipe's name, or, where it has none that can be read, that which the run has."""
    recipe = flow_run.parameters.get("recipe")
    given = recipe.name if isinstance(recipe, Recipe) else recipe.get("name") if isinstance(recipe, dict) else None
    return str(given or flow_run.name)
