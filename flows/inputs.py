"""What a person names in a recipe or a form: artifacts by reference, one field each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from stages.artifacts import Kind
from stages.specs.base import Config

EXAMPLES: Mapping[Kind, tuple[str, ...]] = {
    "model": ("models:/NAME/VERSION", "models:/NAME@ALIAS", "org/name", "./folder", "init:FILE"),
    "dataset": ("datasets:/NAME/VERSION", "datasets:/NAME@ALIAS", "org/name", "./rows.jsonl", "procedural:NAME"),
}


class Inputs(Config):
    """References to saved artifacts, files, hub repositories or generators; those left empty are not given."""


def reference(kind: Kind, title: str, about: str = "", required: bool = False) -> Any:
    """The field of an input; `about` says what it is for."""
    says = " ".join(part for part in (about, f"A {kind}: {', '.join(EXAMPLES[kind])}.") if part)
    shown: dict[str, Any] = {"kind": kind, "examples": list(EXAMPLES[kind])}
    default: Any = ... if required else None
    return Field(default=default, title=title, description=says, json_schema_extra=shown)


def kinds(inputs: type[Inputs]) -> dict[str, Kind]:
    """The inputs with what kind each is."""
    extras: dict[str, Any] = {name: field.json_schema_extra for name, field in inputs.model_fields.items()}
    return {name: extra["kind"] for name, extra in extras.items()}


class BeginningInputs(Inputs):
    """What preference learning begins with. Of `demonstrations` and `prompts`, what is not given is made of `preferences`."""

    model: str | None = reference("model", "model", "The base; with the steps corpus and base, random weights by `init:`.")
    corpus: str | None = reference("dataset", "corpus", "What a base model made here is trained on.")
    demonstrations: str | None = reference("dataset", "demonstrations", "What SFT learns from.")
    prompts: str | None = reference("dataset", "prompts", "What RL trains on, and every model is measured on.")
    preferences: str | None = reference("dataset", "preferences", "Not needed with the steps samples and labels.")


class RlhfInputs(BeginningInputs):
    """What RLHF begins with. Of `demonstrations` and `prompts`, what is not given is made of `preferences`."""

    ptx: str | None = reference("dataset", "ptx", "The demonstrations of PPO-ptx, with ppo.ptx alone.")


class RoundsInputs(Inputs):
    """What rounds begin with."""

    prompts: str | None = reference("dataset", "prompts", "Those held out measure; the others are dealt out to rounds.")
    model: str | None = reference(
        "model", "model", "The first champion, or what the step sft makes it from; needed while the champion's name has none."
    )
    preferences: str | None = reference("dataset", "preferences", "Those to begin with.")
    reward_model: str | None = reference(
        "model",
        "reward_model",
        "Labels when `labels` names no reward; rewards and measures when the recipe has no step of this name.",
    )
    corpus: str | None = reference("dataset", "corpus", "What a base model made here is trained on.")
    demonstrations: str | None = reference("dataset", "demonstrations", "What the step sft learns from.")


class R1Inputs(Inputs):
    """What the road begins with; and, in place of a step of that name, what it would make."""

    model: str | None = reference("model", "model", "The base; with the steps corpus and base, random weights by `init:`.")
    student: str | None = reference("model", "student", "The student's base; with student_base random weights, likewise.")
    corpus: str | None = reference("dataset", "corpus", "What base models made here are trained on.")
    prompts: str | None = reference("dataset", "prompts", "The reasoning prompts.")
    general: str | None = reference("dataset", "general", "The general prompts, which no rule can judge.")
    general_demonstrations: str | None = reference("dataset", "general_demonstrations", "What is mixed into the step sft.")
    base: str | None = reference("model", "base", "In place of the step.")
    zero: str | None = reference("model", "zero", "In place of the step.")
    cold_start_data: str | None = reference("dataset", "cold_start_data", "In place of the step.")
    cold_start: str | None = reference("model", "cold_start", "In place of the step.")
    reasoning: str | None = reference("model", "reasoning", "In place of the step.")
    accepted: str | None = reference("dataset", "accepted", "In place of the step.")
    sft: str | None = reference("model", "sft", "In place of the step.")
    helpful: str | None = reference("model", "helpful", "In place of the step.")
    harmless: str | None = reference("model", "harmless", "In place of the step.")
    second: str | None = reference("model", "second", "In place of the step.")
    student_base: str | None = reference("model", "student_base", "In place of the step.")
