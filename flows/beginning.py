"""What preference learning by a reward model and without one begins with: a base model, SFT, and preferences.

corpus -> base                                  only when the recipe makes its own base model
demonstrations -> sft
prompts -> samples -> labels                    or, with preferences that exist already: preferences

All data is prepared before anything is trained. The held-out prompts, which measure every model, are taken out of all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from flows.inputs import BeginningInputs
from flows.recipe import Recipe
from stages.specs.label import LabelConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from tasks.pipeline import Outputs, Pipeline, Source


class BeginningRecipe(Recipe):
    """Preferences alone are enough as inputs: what is not given of `demonstrations` and `prompts` is made of them, by a step
    whose `form` says so."""

    inputs: BeginningInputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=BeginningInputs, title="Inputs", description="What the steps begin with, by reference."
    )
    corpus: PrepareConfig | None = Field(
        default=None, title="corpus", description="Prepares the corpus of a base model made here."
    )
    base: SftConfig | None = Field(
        default=None, title="base", description="Trains a base model on the corpus; left out when `model` is one."
    )
    demonstrations: PrepareConfig = Field(title="demonstrations", description="Prepares the demonstrations.")
    sft: SftConfig = Field(title="sft", description="Fine-tunes the base on the demonstrations.")
    prompts: PrepareConfig = Field(title="prompts", description="Prepares the prompts; the held-out ones measure every model.")
    samples: SampleConfig | None = Field(
        default=None, title="samples", description="Draws completions of the training prompts from the SFT model, or a teacher."
    )
    labels: LabelConfig | None = Field(default=None, title="labels", description="Makes preferences of the samples.")
    preferences: PrepareConfig | None = Field(
        default=None, title="preferences", description="Prepares the input of this name; left out with samples and labels."
    )


@dataclass(frozen=True)
class Beginning:
    """The datasets by step, each a training and a held-out part; the models; the preferences and what they were made from."""

    data: Mapping[str, Outputs]
    base: Source
    sft: Source
    preferences: Outputs
    samples: Source = None


def begin(pipeline: Pipeline, recipe: BeginningRecipe, data: Mapping[str, Outputs]) -> Beginning:
    """Run the steps up to the preferences, from what `prepared` gave."""
    base = pipeline.input("model")
    if recipe.base is not None and "corpus" in data:
        base = pipeline.step("base", "sft", recipe.base, model=base, **both(data["corpus"]))["checkpoint"]
    sft = pipeline.step("sft", "sft", recipe.sft, model=base, **both(data["demonstrations"]))["checkpoint"]
    if recipe.samples is None or recipe.labels is None:
        return Beginning(data, base, sft, data["preferences"])
    policy, prompts = sft if recipe.samples.endpoint is None else None, data["prompts"]["train"]
    samples = pipeline.step("samples", "sample", recipe.samples, policy=policy, prompts=prompts)["samples"]
    return Beginning(data, base, sft, pipeline.step("labels", "label", recipe.labels, samples=samples), samples)


def prepared(pipeline: Pipeline, recipe: BeginningRecipe) -> dict[str, Outputs]:
    """The datasets by step, each a training and a held-out part."""
    data = {"prompts": prepare(pipeline, "prompts", recipe.prompts, pipeline.input("prompts", "preferences"))}
    heldout = data["prompts"]["heldout"]
    if recipe.base is not None and recipe.corpus is not None:
        data["corpus"] = prepare(pipeline, "corpus", recipe.corpus, pipeline.input("corpus"), heldout)
    source = pipeline.input("demonstrations", "preferences")
    data["demonstrations"] = prepare(pipeline, "demonstrations", recipe.demonstrations, source, heldout)
    if recipe.samples is None or recipe.labels is None:
        config = recipe.preferences or PrepareConfig(heldout=0.1)
        data["preferences"] = prepare(pipeline, "preferences", config, pipeline.input("preferences"), heldout)
    return data


def prepare(pipeline: Pipeline, name: str, config: PrepareConfig, source: Source, exclude: Source = None) -> Outputs:
    """A dataset's step."""
    return pipeline.step(name, "prepare", config, source=source, exclude=exclude)


def both(data: Outputs) -> dict[str, Source]:
    """The two parts of a dataset as a stage's inputs."""
    return {"train": data["train"], "heldout": data["heldout"]}
