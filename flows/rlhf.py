"""Classic RLHF: a base model through supervised fine-tuning, a reward model and PPO, measured on held-out prompts.

corpus -> base                                  only when the recipe makes its own base model
demonstrations -> sft
prompts -> samples -> labels -> reward_model    or, with preferences that exist already: preferences -> reward_model
sft, reward_model, prompts -> ppo               with ptx, demonstrations mixed into its updates, when ppo.ptx is set
prompts, reward_model -> evaluate-base, evaluate-sft, evaluate-ppo

All data is prepared before anything is trained. The held-out prompts, which measure every model, are taken out of all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from prefect import flow
from pydantic import Field, model_validator

from flows.recipe import Recipe
from flows.runner import Definition, run_pipeline
from stages.artifacts import Kind
from stages.specs.evaluate import EvaluateConfig
from stages.specs.label import LabelConfig
from stages.specs.ppo import PpoConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.reward_model import RewardModelConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from tasks.execute import StepResult
from tasks.pipeline import Outputs, Pipeline, Source


class RlhfRecipe(Recipe):
    """Inputs: `model` (a base, or `init:` with the steps corpus and base), `corpus`, `demonstrations`, `prompts`,
    `preferences` (not needed with the steps samples and labels), `ptx` (needed with ppo.ptx alone). Preferences alone are
    enough: what is not given of `demonstrations` and `prompts` is made of them, by a step whose `form` says so."""

    INPUT_KINDS: ClassVar[Mapping[str, Kind]] = {
        "model": "model",
        "corpus": "dataset",
        "demonstrations": "dataset",
        "prompts": "dataset",
        "preferences": "dataset",
        "ptx": "dataset",
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
        default=None, title="samples", description="Draws completions of the training prompts from the SFT model, or a teacher."
    )
    labels: LabelConfig | None = Field(default=None, title="labels", description="Makes preferences of the samples.")
    preferences: PrepareConfig | None = Field(
        default=None, title="preferences", description="Prepares the input of this name; left out with samples and labels."
    )
    reward_model: RewardModelConfig = Field(title="reward_model", description="Learns a reward from the preferences.")
    ptx: PrepareConfig | None = Field(
        default=None, title="ptx", description="Prepares the demonstrations that PPO mixes into its updates, as ppo.ptx says."
    )
    ppo: PpoConfig = Field(title="ppo", description="Optimises the SFT model on the prompts by the learned reward.")
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every model is measured.")

    @model_validator(mode="after")
    def _ptx(self) -> RlhfRecipe:
        if self.ppo.ptx is None and (self.ptx is not None or "ptx" in self.inputs):
            raise ValueError(
                "the recipe gives demonstrations for PPO-ptx, but ppo.ptx, which says how to mix them in, is not set"
            )
        return self


def steps(pipeline: Pipeline, recipe: RlhfRecipe) -> None:
    """The steps in order."""
    data = prepared(pipeline, recipe)
    prompts, demonstrations = data["prompts"], data["demonstrations"]
    base = pipeline.input("model")
    if recipe.base is not None and "corpus" in data:
        base = pipeline.step("base", "sft", recipe.base, model=base, **_both(data["corpus"]))["checkpoint"]
    sft = pipeline.step("sft", "sft", recipe.sft, model=base, **_both(demonstrations))["checkpoint"]

    samples, preferences = None, data.get("preferences")
    if recipe.samples is not None and recipe.labels is not None:
        policy = sft if recipe.samples.endpoint is None else None
        samples = pipeline.step("samples", "sample", recipe.samples, policy=policy, prompts=prompts["train"])["samples"]
        preferences = pipeline.step("labels", "label", recipe.labels, samples=samples)
    assert preferences is not None
    learnt_from = {**_both(preferences), "demonstrations": demonstrations["train"], "samples": samples}
    reward = pipeline.step("reward_model", "reward_model", recipe.reward_model, model=sft, **learnt_from)["checkpoint"]

    measured = {"prompts": prompts["heldout"], "reward_model": reward}
    pipeline.step("evaluate-base", "evaluate", recipe.evaluate, policy=base, **measured)
    pipeline.step("evaluate-sft", "evaluate", recipe.evaluate, policy=sft, reference=base, opponent=base, **measured)

    ptx = data["ptx"]["train"] if "ptx" in data else None
    models = {"policy": sft, "reward": reward, "reference": sft}
    ppo = pipeline.step("ppo", "ppo", recipe.ppo, prompts=prompts["train"], ptx=ptx, **models)["checkpoint"]
    pipeline.step("evaluate-ppo", "evaluate", recipe.evaluate, policy=ppo, reference=sft, opponent=sft, **measured)


def prepared(pipeline: Pipeline, recipe: RlhfRecipe) -> dict[str, Outputs]:
    """The datasets by step, each a training and a held-out part."""

    def prepare(name: str, config: PrepareConfig, source: Source, exclude: Source = None) -> Outputs:
        return pipeline.step(name, "prepare", config, source=source, exclude=exclude)

    data = {"prompts": prepare("prompts", recipe.prompts, pipeline.input("prompts", "preferences"))}
    heldout = data["prompts"]["heldout"]
    if recipe.base is not None and recipe.corpus is not None:
        data["corpus"] = prepare("corpus", recipe.corpus, pipeline.input("corpus"), heldout)
    source = pipeline.input("demonstrations", "preferences")
    data["demonstrations"] = prepare("demonstrations", recipe.demonstrations, source, heldout)
    if recipe.samples is None or recipe.labels is None:
        config = recipe.preferences or PrepareConfig(heldout=0.1)
        data["preferences"] = prepare("preferences", config, pipeline.input("preferences"), heldout)
    if recipe.ppo.ptx is not None:
        data["ptx"] = prepare("ptx", recipe.ptx or PrepareConfig(), pipeline.input("ptx"), heldout)
    return data


def _both(data: Outputs) -> dict[str, Source]:
    return {"train": data["train"], "heldout": data["heldout"]}


@flow(name="rlhf", flow_run_name="{recipe.name}", persist_result=False)
def rlhf(recipe: RlhfRecipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    return run_pipeline(recipe, steps, from_step)


DEFINITION = Definition(RlhfRecipe, rlhf, steps)
