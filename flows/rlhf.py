"""Classic RLHF: a base model through supervised fine-tuning, measured on held-out prompts.

corpus -> base            (only when the recipe makes its own base model)
demonstrations -> sft
prompts -> evaluate-base, evaluate-sft
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
from stages.specs.prepare import PrepareConfig
from stages.specs.sft import SftConfig
from tasks.execute import StepResult
from tasks.pipeline import Pipeline


class RlhfRecipe(Recipe):
    """Inputs: `model` (a base, or `init:` with the steps corpus and base), `corpus`, `demonstrations`, `prompts`."""

    INPUT_KINDS: ClassVar[Mapping[str, Kind]] = {
        "model": "model",
        "corpus": "dataset",
        "demonstrations": "dataset",
        "prompts": "dataset",
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
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every model is measured.")


def steps(pipeline: Pipeline, recipe: RlhfRecipe) -> None:
    """The steps in order."""
    base = pipeline.input("model")
    if recipe.base is not None and recipe.corpus is not None:
        corpus = pipeline.step("corpus", "prepare", recipe.corpus, source=pipeline.input("corpus"))
        trained = pipeline.step("base", "sft", recipe.base, model=base, train=corpus["train"], heldout=corpus["heldout"])
        base = trained["checkpoint"]

    demonstrations = pipeline.step("demonstrations", "prepare", recipe.demonstrations, source=pipeline.input("demonstrations"))
    sft = pipeline.step("sft", "sft", recipe.sft, model=base, train=demonstrations["train"], heldout=demonstrations["heldout"])[
        "checkpoint"
    ]

    prompts = pipeline.step("prompts", "prepare", recipe.prompts, source=pipeline.input("prompts"))["heldout"]
    pipeline.step("evaluate-base", "evaluate", recipe.evaluate, policy=base, prompts=prompts)
    pipeline.step("evaluate-sft", "evaluate", recipe.evaluate, policy=sft, prompts=prompts, reference=base, opponent=base)


@flow(name="rlhf", flow_run_name="{recipe.name}", persist_result=False)
def rlhf(recipe: RlhfRecipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    return run_pipeline(recipe, steps, from_step)


RECIPE, FLOW = RlhfRecipe, rlhf
