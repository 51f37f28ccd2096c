"""What every stage's spec is made of, and the key that identifies one computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from stages.artifacts import Kind, digest_of
from stages.specs.shape import shape

OPERATIONAL: dict[str, Any] = {"operational": True}


class Config(BaseModel):
    """A frozen config that refuses unknown keys. Every field is identity unless it is marked with `OPERATIONAL`.

    A mapping given for a field that is a config changes only what it names: the rest stays what the field's default says, which
    may differ from the defaults of that config's class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        return {name: _laid_over(defaults.get(name), value) for name, value in values.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        shape(cls, handler.resolve_ref_schema(schema), handler)
        return schema

    def identity(self) -> dict[str, Any]:
        """The fields that can change the result, as JSON values; operational ones are left out at every depth."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
        }


def _laid_over(default: Any, given: Any) -> Any:
    if not isinstance(default, Config) or not isinstance(given, dict):
        return given
    kept = {name: getattr(default, name) for name in type(default).model_fields}
    return kept | {name: _laid_over(kept.get(name), value) for name, value in given.items()}


def _identity(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    if isinstance(value, dict):
        return {name: _identity(item) for name, item in value.items()}
    return value


@dataclass(frozen=True)
class Port:
    """An input of a stage: what kind of artifact it takes, and whether it may be left out."""

    kind: Kind
    required: bool = True


@dataclass(frozen=True)
class StageSpec:
    """What the orchestrating side knows of a stage without importing torch.

    `version` is raised by hand when code changes what the stage makes from the same config and inputs. `headline` names the
    metrics that a table of steps shows. A `distributed` stage can run on several processes at once.
    """

    name: str
    version: int
    config: type[Config]
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Kind]
    headline: tuple[str, ...] = ()
    distributed: bool = False

    @property
    def main(self) -> str:
        """The output that a step of the stage is for."""
        return next(iter(self.outputs))

    def identity(self, config: Config, inputs: Mapping[str, str]) -> dict[str, Any]:
        """All that decides the result: stage, version, config identity (reward versions within), input digests."""
        return {"stage": self.name, "version": self.version, "config": config.identity(), "inputs": dict(inputs)}

    def key(self, config: Config, inputs: Mapping[str, str]) -> str:
        """sha256 of the identity (DESIGN 3)."""
        return digest_of(self.identity(config, inputs))


class Runtime(Config):
    """How a stage uses its machine. None of it changes the result in exact arithmetic, so none of it is identity."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        title="Device",
        description="auto, cpu, cuda or cuda:N. auto takes a GPU when there is one.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        title="Threads",
        description="CPU threads of torch. 0: one for a model under a million parameters, else all cores.",
    )
    micro_batch_tokens: int = Field(
        default=16384,
        ge=1,
        title="Tokens a micro-batch",
        description="Padded tokens in one forward pass; smaller needs less memory.",
    )
    packed: bool = Field(
        default=False,
        title="Pack",
        description="Lay the sequences of a micro-batch end to end in one row instead of padding them.",
    )
    share_prompts: bool = Field(
        default=False,
        title="Share prompts",
        description="In grpo, preference and log_probs, compute a prompt once for all its completions: for long prompts.",
    )
    generation_batch: int = Field(default=256, ge=1, title="Generation batch", description="Sequences generated side by side.")
    save_every: int = Field(default=200, ge=1, title="Save every", description="Steps between resume states.")
    log_every: int = Field(default=10, ge=1, title="Log every", description="Steps between logged metrics.")
