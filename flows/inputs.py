"""What a person names in a recipe or a form: artifacts by reference, one field each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.artifacts import Kind
from stages.specs.base import Config

EXAMPLES: Mapping[Kind, tuple[str, ...]] = {
    "model": ("models:/NAME/VERSION", "models:/NAME@ALIAS", "org/name", "./folder", "init:FILE"),
    "dataset": ("datasets:/NAME/VERSION", "datasets:/NAME@ALIAS", "org/name", "./rows.jsonl", "procedural:NAME"),
}


class Inputs(Config):
    """References to saved artifacts, files, hub repositories or generators; those left empty are not given."""

    # Steps whose held-out rows are always read.
    BOTH: ClassVar[Sequence[str]] = ()

    @model_validator(mode="after")
    def _parts(self) -> Self:
        given = {name for name, reference in self if reference}
        for name in type(self).model_fields:
            step, _, output = name.rpartition("_")
            train, heldout = f"{step}_train", f"{step}_heldout"
            if output == "heldout" and heldout in given and train not in given:
                raise ValueError(f"{heldout} is given without {train}: in the place of the step {step} give both")
            if output == "train" and step in self.BOTH and train in given and heldout not in given:
                raise ValueError(f"{train} is given without {heldout}: in the place of the step {step} give both")
        return self


def reference(kind: Kind, title: str, about: str = "", required: bool = False) -> Any:
    """The field of an input; `about` says what it is for."""
    says = " ".join(part for part in (about, f"A {kind}: {', '.join(EXAMPLES[kind])}.") if part)
    shown: dict[str, Any] = {"kind": kind, "examples": list(EXAMPLES[kind])}
    default: Any = ... if required else None
    return Field(default=default, title=title, description=says, json_schema_extra=shown)


def instead(kind: Kind, step: str, about: str = "") -> Any:
    """The input of what a step is for, which is then not run."""
    return reference(kind, step, " ".join(says for says in ("In place of the step.", about) if says))


def part(step: str, output: Literal["train", "heldout"], about: str = "") -> Any:
    """The input of one of a step's two datasets; the step is then not run."""
    rows = "training" if output == "train" else "held-out"
    says = f"In place of the step {step}: its {rows} rows, prepared."
    return reference("dataset", f"{step}, {rows}", " ".join(text for text in (says, about) if text))


def kinds(inputs: type[Inputs]) -> dict[str, Kind]:
    """The inputs with what kind each is."""
    extras: dict[str, Any] = {name: field.json_schema_extra for name, field in inputs.model_fields.items()}
    return {name: extra["kind"] for name, extra in extras.items()}


class BeginningInputs(Inputs):
    """What preference learning begins with: of `demonstrations` and `prompts`, what is not given is made of `preferences`; and,
    in the place of steps, what they would make."""

    BOTH: ClassVar[Sequence[str]] = ("prompts", "preferences")

    model: str | None = reference("model", "model", "The base; with the steps corpus and base, random weights by `init:`.")
    corpus: str | None = reference("dataset", "corpus", "What a base model made here is trained on.")
    demonstrations: str | None = reference("dataset", "demonstrations", "What SFT learns from.")
    prompts: str | None = reference("dataset", "prompts", "What RL trains on, and every model is measured on.")
    preferences: str | None = reference("dataset", "preferences", "Not needed with the steps samples and labels.")
    corpus_train: str | None = part("corpus", "train")
    corpus_heldout: str | None = part("corpus", "heldout")
    base: str | None = instead("model", "base")
    demonstrations_train: str | None = part("demonstrations", "train")
    demonstrations_heldout: str | None = part("demonstrations", "heldout")
    sft: str | None = instead("model", "sft", "No base is trained then.")
    prompts_train: str | None = part("prompts", "train", "With the held-out ones.")
    prompts_heldout: str | None = part("prompts", "heldout", "They measure every model.")
    samples: str | None = instead("dataset", "samples")
    preferences_train: str | None = part("preferences", "train", "Or samples and labels. With the held-out ones.")
    preferences_heldout: str | None = part("preferences", "heldout", "Or samples and labels.")
    reward_model: str | None = instead("model", "reward_model")


class RlhfInputs(BeginningInputs):
    """What RLHF begins with: of `demonstrations` and `prompts`, what is not given is made of `preferences`; and, in the place
    of steps, what they would make."""

    ptx: str | None = reference("dataset", "ptx", "The demonstrations of PPO-ptx, with ppo.ptx alone.")
    ptx_train: str | None = part("ptx", "train")
    dpo: str | None = instead("model", "dpo")


class DpoInputs(BeginningInputs):
    """What preference optimisation begins with: of `demonstrations` and `prompts`, what is not given is made of `preferences`;
    and, in the place of steps, what they would make."""

    reference_train: str | None = part("reference", "train", "Of SFT, for pairs.")
    reference_heldout: str | None = part("reference", "heldout", "Of SFT, for pairs.")


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
    """What the road begins with; and, in the place of steps, what they would make."""

    BOTH: ClassVar[Sequence[str]] = ("prompts", "helpful_labels", "harmless_labels")

    model: str | None = reference("model", "model", "The base; with the steps corpus and base, random weights by `init:`.")
    student: str | None = reference("model", "student", "The student's base; with student_base random weights, likewise.")
    corpus: str | None = reference("dataset", "corpus", "What base models made here are trained on.")
    prompts: str | None = reference("dataset", "prompts", "The reasoning prompts.")
    general: str | None = reference("dataset", "general", "The general prompts, which no rule can judge.")
    general_demonstrations: str | None = reference("dataset", "general_demonstrations", "What is mixed into the step sft.")
    corpus_train: str | None = part("corpus", "train")
    corpus_heldout: str | None = part("corpus", "heldout")
    prompts_train: str | None = part("prompts", "train", "With the held-out ones.")
    prompts_heldout: str | None = part("prompts", "heldout", "They measure every policy.")
    base: str | None = instead("model", "base")
    zero: str | None = instead("model", "zero")
    traces: str | None = instead("dataset", "traces")
    cold_start_data: str | None = instead("dataset", "cold_start_data")
    cold_start: str | None = instead("model", "cold_start")
    reasoning: str | None = instead("model", "reasoning")
    samples: str | None = instead("dataset", "samples")
    accepted: str | None = instead("dataset", "accepted")
    general_train: str | None = part("general", "train")
    general_heldout: str | None = part("general", "heldout")
    general_demonstrations_train: str | None = part("general_demonstrations", "train")
    sft: str | None = instead("model", "sft")
    answers: str | None = instead("dataset", "answers")
    helpful_labels_train: str | None = part("helpful_labels", "train", "With the held-out ones.")
    helpful_labels_heldout: str | None = part("helpful_labels", "heldout")
    helpful: str | None = instead("model", "helpful")
    harmless_labels_train: str | None = part("harmless_labels", "train", "With the held-out ones.")
    harmless_labels_heldout: str | None = part("harmless_labels", "heldout")
    harmless: str | None = instead("model", "harmless")
    second: str | None = instead("model", "second")
    student_base: str | None = instead("model", "student_base")
