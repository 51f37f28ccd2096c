"""Classic RLHF: a base model through supervised fine-tuning, a reward model and PPO, measured on held-out prompts.

corpus -> base                                  only when the recipe makes its own base model
demonstrations -> sft
prompts -> samples -> labels -> reward_model    or, with preferences that exist already: preferences -> reward_model
sft, reward_model, prompts -> ppo
prompts, reward_model -> evaluate-base, evaluate-sft, evaluate-ppo

The held-out prompts, which measure every model, are taken out of the demonstrations and the preferences too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from prefect import flow
from pydantic import Field

from flows.recipe import Recipe
from flows.runner import run_pipeline
from stages.artifacts import Kind
from stages.specs.evaluate import EvaluateConfig
from stages.specs.label import LabelConfig
from stages.specs.ppo import PpoConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.reward_model import RewardModelConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from tasks.execute import StepResult
from tasks.pipeline import Pipeline


class RlhfRecipe(Recipe):
    """Inputs: `model` (a base, or `init:` with the steps corpus and base), `corpus`, `demonstrations`, `prompts`,
    `preferences` (not needed with the steps samples and labels). Preferences alone are enough: what is not given of
    `demonstrations` and `prompts` is made of them, by a step whose `form` says so."""

    INPUT_KINDS: ClassVar[Mapping[str, Kind]] = {
        "model": "model",
        "corpus": "dataset",
        "demonstrations": "dataset",
        "prompts": "dataset",
        "preferences": "dataset",
    }

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
        default=None, title="samples", description="Draws completions of the training prompts from the SFT model."
    )
    labels: LabelConfig | None = Field(default=None, title="labels", description="Makes preferences of the samples.")
    preferences: PrepareConfig | None = Field(
        default=None, title="preferences", description="Prepares the input of this name; left out with samples and labels."
    )
    reward_model: RewardModelConfig = Field(title="reward_model", description="Learns a reward from the preferences.")
    ppo: PpoConfig = Field(title="ppo", description="Optimises the SFT model on the prompts by the learned reward.")
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every model is measured.")


def steps(pipeline: Pipeline, recipe: RlhfRecipe) -> None:
    """The steps in order."""
    base = pipeline.input("model")
    if recipe.base is not None and recipe.corpus is not None:
        corpus = pipeline.step("corpus", "prepare", recipe.corpus, source=pipeline.input("corpus"))
        trained = pipeline.step("base", "sft", recipe.base, model=base, train=corpus["train"], heldout=corpus["heldout"])
        base = trained["checkpoint"]

    source = pipeline.input("prompts", "preferences")
    prompts = pipeline.step("prompts", "prepare", recipe.prompts, source=source)
    heldout = prompts["heldout"]
    source = pipeline.input("demonstrations", "preferences")
    demonstrations = pipeline.step("demonstrations", "prepare", recipe.demonstrations, source=source, exclude=heldout)
    sft = pipeline.step("sft", "sft", recipe.sft, model=base, train=demonstrations["train"], heldout=demonstrations["heldout"])[
        "checkpoint"
    ]

    samples = None
    if recipe.samples is not None and recipe.labels is not None:
        samples = pipeline.step("samples", "sample", recipe.samples, policy=sft, prompts=prompts["train"])["samples"]
        preferences = pipeline.step("labels", "label", recipe.labels, samples=samples)
    else:
        given = recipe.preferences or PrepareConfig(heldout=0.1)
        source = pipeline.input("preferences")
        preferences = pipeline.step("preferences", "prepare", given, source=source, exclude=heldout)
    reward = pipeline.step(
        "reward_model",
        "reward_model",
        recipe.reward_model,
        model=sft,
        train=preferences["train"],
        heldout=preferences["heldout"],
        demonstrations=demonstrations["train"],
        samples=samples,
    )["checkpoint"]
    ppo = pipeline.step("ppo", "ppo", recipe.ppo, policy=sft, reward=reward, prompts=prompts["train"], reference=sft)[
        "checkpoint"
    ]

    measured = {"prompts": heldout, "reward_model": reward}
    pipeline.step("evaluate-base", "evaluate", recipe.evaluate, policy=base, **measured)
    pipeline.step("evaluate-sft", "evaluate", recipe.evaluate, policy=sft, reference=base, opponent=base, **measured)
    pipeline.step("evaluate-ppo", "evaluate", recipe.evaluate, policy=ppo, reference=sft, opponent=sft, **measured)


@flow(name="rlhf", flow_run_name="{recipe.name}", persist_result=False)
def rlhf(recipe: RlhfRecipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    return run_pipeline(recipe, steps, from_step)


RECIPE, FLOW = RlhfRecipe, rlhf
