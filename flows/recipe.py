"""Recipes: one YAML file is one flow's parameters."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from flows.inputs import Inputs, kinds
from flows.pools import Pools
from stages.artifacts import Kind
from stages.errors import InputError
from stages.specs import STAGES, Config
from stages.specs.common import UNSAID
from tasks.launch import Launch


class Recipe(Config):
    """What every recipe has. Its other fields are one config a step. `ALWAYS` says which steps, or artifacts in their place, it
    cannot do without; `NEEDS` which a step cannot."""

    ALWAYS: ClassVar[Sequence[str]] = ()
    NEEDS: ClassVar[Mapping[str, Sequence[str]]] = {}

    name: str = Field(
        pattern=r"^[A-Za-z0-9][\w-]*$",
        title="Name",
        description="Prefix of the artifacts' names: letters, digits, _ and -. A file's recipe has its file's name, if none.",
    )
    seed: int = Field(default=0, title="Seed", description="Seed of every step that does not set its own.")
    inputs: Inputs = Field(default_factory=Inputs, title="Inputs", description="What the steps begin with, by reference.")
    launch: Launch = Field(default_factory=Launch, title="Launch", description="How stages are started.")
    pools: Pools = Field(default_factory=Pools, title="Pools", description="Where stages run.")

    @model_validator(mode="before")
    @classmethod
    def _seeds(cls, values: Any) -> Any:
        """Give the recipe's seed to the steps that have none."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for name, value in values.items():
            kind = config_type(cls.model_fields[name].annotation) if name in cls.model_fields else None
            if isinstance(value, dict) and kind is not None and "seed" in kind.model_fields and value.get("seed") is None:
                filled[name] = value | {"seed": values.get("seed", 0)}
        return filled

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for step in (one for one in self.ALWAYS if not self.has(one)):
            about = type(self).model_fields[step].description
            raise ValueError(f"{step} is missing: {about} In its place there may be {self._place(step)}")
        for step, others in self.NEEDS.items():
            missing = next((other for other in others if not self.has(other)), None) if self.makes(step) else None
            if missing:
                raise ValueError(
                    f"the step {step} needs {missing}: a step of this name, or {self._place(missing)} in its place"
                )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        fields = handler.resolve_ref_schema(schema)["properties"]
        # The steps come before what no result depends on.
        for name in ("launch", "pools"):
            fields[name]["position"] += len(fields)
        for name in cls.model_fields:
            step = fields[name].get("then", fields[name])
            within = handler.resolve_ref_schema(step).get("properties", {}) if name != "inputs" else {}
            # A form sends every default that it shows, and a step's would hide the recipe's seed.
            if within.get("seed", {}).pop("default", None) is not None:
                within["seed"]["description"] += " Empty: the recipe's."
        return schema

    def given(self) -> dict[str, str]:
        """The inputs that are given."""
        return {name: reference for name, reference in dict(self.inputs).items() if reference}

    def stage(self, step: str) -> str:
        """The stage of a step that is a field of the recipe."""
        config = config_type(type(self).model_fields[step].annotation)
        return next(name for name, spec in STAGES.items() if spec.config is config)

    def in_place(self, step: str, stage: str | None = None) -> dict[str, str]:
        """The inputs given in the place of a step, by the outputs that they stand for: NAME_OUTPUT, or just NAME for what the
        step is for. An input that is named as a step of `prepare` is what that reads."""
        spec = STAGES[stage or self.stage(step)]
        named = {f"{step}_{output}": output for output in spec.outputs}
        if spec.name != "prepare":
            named[step] = spec.main
        return {output: name for name, output in named.items() if name in self.given()}

    def _place(self, step: str) -> str:
        return f"inputs.{step}_train" if self.stage(step) == "prepare" else f"inputs.{step}"

    def has(self, step: str) -> bool:
        """Whether there is what a step makes: by the step, or by what is given in its place."""
        return getattr(self, step) is not None or bool(self.in_place(step))

    def makes(self, step: str) -> bool:
        """Whether a step is there and nothing is given in its place."""
        return getattr(self, step) is not None and not self.in_place(step)

    def references(self) -> dict[str, tuple[str, Kind]]:
        """The inputs that are given, with what kind each is."""
        every = kinds(type(self.inputs))
        return {name: (reference, every[name]) for name, reference in self.given().items()}


def config_type(annotation: Any) -> type[BaseModel] | None:
    """The config class of a field's annotation, through Optional."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    options = typing.get_args(annotation) if union else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def read_recipe(path: Path, settings: Sequence[str] = (), seed: int | None = None) -> dict[str, Any]:
    """A recipe's mapping with `--set` and `--seed` applied, not validated yet. Raises InputError when it is no recipe."""
    values = _read_mapping(path, ())
    if not isinstance(values.get("flow"), str):
        raise InputError(f"{path}: a recipe is a mapping with a key `flow`")
    values.setdefault("name", _name(path))
    for setting in settings:
        apply(values, setting)
    return values if seed is None else values | {"seed": seed}


def _read_mapping(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file's mapping, laid over that of the file that it `extends`, if any (a path relative to it)."""
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such recipe{near(str(path), others)}")
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself, by way of {', '.join(other.name for other in seen)}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping with a key `flow`")
    below = values.pop("extends", None)
    if below is None:
        return values
    return _laid_over(_read_mapping(path.parent / str(below), (*seen, path.resolve())) | {"name": _name(path)}, values)


def _name(path: Path) -> str:
    """A recipe's name by its file: MLflow's names of models have no dots."""
    return path.stem.replace(".", "-")


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _laid_over(merged[name], value) if both else value
    return merged


def apply(values: dict[str, Any], setting: str) -> None:
    """Apply one `a.b.c=value`, the value read as YAML. Raises InputError when there is no `=` or a part is no mapping."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise InputError(f"--set {setting}: write it as step.field=value")
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {setting}: {parent} is a value, not a mapping")
    value = yaml.safe_load(text)
    # YAML 1.1 reads 1e-4 as text.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = yaml.safe_load(text)
    place[last] = value


R = TypeVar("R", bound=Recipe)


def parse(kind: type[R], values: Mapping[str, Any], where: str) -> R:
    """Validate a recipe's mapping. Raises InputError with one line for each thing that is wrong, near names included."""
    try:
        return kind.model_validate({name: value for name, value in values.items() if name != "flow"})
    except ValidationError as error:
        # Without its cause, which says every value that was given: logs would show it.
        raise InputError("\n".join(f"{where}: {explain(kind, problem)}" for problem in error.errors())) from None


def explain(kind: type[BaseModel], problem: Any) -> str:
    """One validation problem in words."""
    *parents, last = (str(part) for part in problem["loc"]) if problem["loc"] else ("recipe",)
    path = ".".join([*parents, last])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}{near(last, siblings(kind, parents))}"
    if problem["type"] == "missing":
        owner = _config_at(kind, parents)
        about = owner.model_fields[last].description if owner else None
        return f"{path} is missing" + (f": {about}" if about else "")
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    # A whole step as it was given would bury what is wrong with it.
    unsaid = problem["type"] in UNSAID or isinstance(problem["input"], dict)
    return f"{path}: {message}" + ("" if unsaid else f" (it is {problem['input']!r})")


def siblings(kind: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Names of the keys that are allowed below a path."""
    owner = _config_at(kind, parents)
    return list(owner.model_fields) if owner else []


def _config_at(kind: type[BaseModel], parents: Sequence[str]) -> type[BaseModel] | None:
    """The config class below a path, where there is one."""
    for parent in parents:
        field = kind.model_fields.get(parent)
        inner = config_type(field.annotation) if field else None
        if inner is None:
            return None
        kind = inner
    return kind


def near(name: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    """`; did you mean X?`, or the list of what there is."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}" if names else ""
