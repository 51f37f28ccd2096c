"""What preference learning by a reward model and without one begins with: a base model, SFT, and preferences.

corpus -> base                                  only when the recipe makes its own base model
demonstrations -> sft
prompts -> samples -> labels                    or, with preferences that exist already: preferences

All data is prepared before anything is trained. The held-out prompts, which measure every model, are taken out of all of it.

An artifact given in a step's place stands for what the step would make, and what nothing reads then is not made: with a reward
model no labels, with an SFT model no base. A base beside that is measured if it is given too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from flows.inputs import BeginningInputs
from flows.places import dataset, given, made
from flows.recipe import Recipe
from stages.specs.label import LabelConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from stages.specs.shape import AT_FIRST_ON
from tasks.pipeline import Outputs, Pipeline, Source


class BeginningRecipe(Recipe):
    """Preferences alone are enough as inputs: what is not given of `demonstrations` and `prompts` is made of them, by a step
    whose `form` says so."""

    ALWAYS: ClassVar[Sequence[str]] = ("prompts", "sft")
    NEEDS: ClassVar[Mapping[str, Sequence[str]]] = {"sft": ["demonstrations"]}

    inputs: BeginningInputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=BeginningInputs, title="Inputs", description="What the steps begin with, by reference."
    )
    corpus: PrepareConfig | None = Field(
        default=None, title="corpus", description="Prepares the corpus of a base model made here."
    )
    base: SftConfig | None = Field(
        default=None, title="base", description="Trains a base model on the corpus; left out when `model` is one."
    )
    demonstrations: PrepareConfig | None = Field(
        default=None, title="demonstrations", description="Prepares the demonstrations.", json_schema_extra=AT_FIRST_ON
    )
    sft: SftConfig | None = Field(
        default=None, title="sft", description="Fine-tunes the base on the demonstrations.", json_schema_extra=AT_FIRST_ON
    )
    prompts: PrepareConfig | None = Field(
        default=None,
        title="prompts",
        description="Prepares the prompts; the held-out ones measure every model.",
        json_schema_extra=AT_FIRST_ON,
    )
    samples: SampleConfig | None = Field(
        default=None, title="samples", description="Draws completions of the training prompts from the SFT model, or a teacher."
    )
    labels: LabelConfig | None = Field(default=None, title="labels", description="Makes preferences of the samples.")
    preferences: PrepareConfig | None = Field(
        default=None, title="preferences", description="Prepares the input of this name; left out with samples and labels."
    )

    @property
    def trains_base(self) -> bool:
        """Whether a base model is made here: not only to be compared with an SFT model that does not come of it."""
        return self.makes("base") and self.has("corpus") and not self.in_place("sft")

    @property
    def labels_samples(self) -> bool:
        """Whether preferences are made of samples."""
        return self.labels is not None and self.has("samples") and not self.in_place("preferences")

    @property
    def reads_preferences(self) -> bool:
        """Whether any step does."""
        return True

    @property
    def reads_demonstrations(self) -> bool:
        """Whether any step does."""
        return self.makes("sft")

    @property
    def reads_samples(self) -> bool:
        """Whether any step does, beside labels."""
        return False


@dataclass(frozen=True)
class Beginning:
    """The datasets by step, each a training and a held-out part; the models; the preferences and what they were made from.
    What no step reads is None."""

    data: Mapping[str, Outputs]
    base: Source
    sft: Source
    preferences: Outputs | None
    samples: Source = None


def begin(pipeline: Pipeline, recipe: BeginningRecipe, data: Mapping[str, Outputs]) -> Beginning:
    """Run the steps up to the preferences, from what `prepared` gave."""
    base = _base(pipeline, recipe, data)
    sft = made(pipeline, recipe, "sft", model=base, **both(data.get("demonstrations")))["checkpoint"]
    preferences, samples = data.get("preferences"), _samples(pipeline, recipe, sft, data["prompts"])
    if recipe.reads_preferences and preferences is None:
        preferences = made(pipeline, recipe, "labels", samples=samples)
    return Beginning(data, base, sft, preferences, samples)


def _base(pipeline: Pipeline, recipe: BeginningRecipe, data: Mapping[str, Outputs]) -> Source:
    """The base that SFT starts from, or that is given to be compared with."""
    if (base := given(pipeline, recipe, "base")) is not None:
        return base["checkpoint"]
    if recipe.trains_base:
        return made(pipeline, recipe, "base", model=pipeline.input("model"), **both(data.get("corpus")))["checkpoint"]
    if recipe.in_place("sft"):
        # Beside a step that trains a base, `model` is what that begins with.
        return pipeline.inputs.get("model") if recipe.base is None else None
    return pipeline.input("model")


def _samples(pipeline: Pipeline, recipe: BeginningRecipe, sft: Source, prompts: Outputs) -> Source:
    read = recipe.reads_samples or (recipe.reads_preferences and recipe.labels_samples)
    if not (read and recipe.has("samples")):
        return None
    teacher = recipe.samples is not None and recipe.samples.endpoint is not None
    policy = None if teacher else sft
    return made(pipeline, recipe, "samples", policy=policy, prompts=prompts["train"])["samples"]


def prepared(pipeline: Pipeline, recipe: BeginningRecipe) -> dict[str, Outputs]:
    """The datasets by step, each a training and a held-out part."""
    data = {"prompts": dataset(pipeline, recipe, "prompts", "preferences")}
    heldout = data["prompts"]["heldout"]
    if recipe.trains_base:
        data["corpus"] = dataset(pipeline, recipe, "corpus", exclude=heldout)
    if recipe.reads_demonstrations and recipe.has("demonstrations"):
        data["demonstrations"] = dataset(pipeline, recipe, "demonstrations", "preferences", exclude=heldout)
    if recipe.reads_preferences and not recipe.labels_samples:
        usual = PrepareConfig(heldout=0.1)
        data["preferences"] = dataset(pipeline, recipe, "preferences", exclude=heldout, default=usual)
    return data


def prepare(pipeline: Pipeline, name: str, config: PrepareConfig, source: Source, exclude: Source = None) -> Outputs:
    """A dataset's step."""
    return pipeline.step(name, "prepare", config, source=source, exclude=exclude)


def both(data: Outputs | None) -> dict[str, Source]:
    """The two parts of a dataset as a stage's inputs; none of one that is not there."""
    return {} if data is None else {"train": data["train"], "heldout": data["heldout"]}
