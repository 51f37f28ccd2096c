"""DeepSeek-R1's road to a reasoning model (arXiv 2501.12948; rl4llm 6.6, 6.7), measured on held-out prompts after every policy.

corpus -> base                                       only when the recipe makes its own base model
base -> zero                                         R1-Zero: RL on rules alone, without a demonstration
zero -> traces -> cold_start_data                    its few readable long answers, or a teacher's, or a dataset that is given
base, cold_start_data -> cold_start
cold_start -> reasoning                              RL with language consistency, in one or several outer iterations
reasoning -> samples -> accepted                     rejection sampling from the converged checkpoint
base, accepted + general_demonstrations -> sft       of the base model, not of the converged one
sft -> answers -> labels -> helpful, harmless        two reward models for general prompts
sft, prompts + general -> second                     RL with rules for reasoning and learned rewards for general prompts
student, accepted -> distilled                       beside student_rl, the same RL run directly on the student (6.7.5)

Every step can be left out, or entered from what is saved: an input named as the step stands for what it would make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from flows.forms import recipe_flow
from flows.inputs import R1Inputs
from flows.iterations import iteration
from flows.places import dataset, given, made
from flows.recipe import Recipe
from flows.runner import Definition, run_pipeline
from stages.specs import STAGES, Config
from stages.specs.distill import DistillConfig
from stages.specs.evaluate import EvaluateConfig
from stages.specs.grpo import GrpoConfig
from stages.specs.label import LabelConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.rejection import RejectionConfig
from stages.specs.reward_model import RewardModelConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from stages.specs.shape import AT_FIRST_ON
from tasks.execute import StepResult
from tasks.pipeline import Outputs, Pipeline, Source


class R1Recipe(Recipe):
    """R1-Zero, a cold start, reasoning RL, rejection sampling and SFT, a second RL, distillation: any of these steps, or what
    is saved in its place."""

    ALWAYS: ClassVar[Sequence[str]] = ("prompts",)
    NEEDS: ClassVar[Mapping[str, Sequence[str]]] = {
        "base": ["corpus"],
        "cold_start_data": ["traces"],
        "cold_start": ["cold_start_data"],
        "accepted": ["samples"],
        "sft": ["accepted"],
        "answers": ["general"],
        "helpful_labels": ["answers"],
        "harmless_labels": ["answers"],
        "helpful": ["helpful_labels"],
        "harmless": ["harmless_labels"],
        "student_base": ["corpus"],
        "distilled": ["accepted"],
    }

    inputs: R1Inputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=R1Inputs,
        title="Inputs",
        description="What the road begins with, by reference; and, in place of a step of that name, a saved model or dataset.",
    )
    corpus: PrepareConfig | None = Field(
        default=None, title="corpus", description="Prepares the corpus of base models made here."
    )
    base: SftConfig | None = Field(
        default=None, title="base", description="Trains a base model on the corpus; left out when `model` is one."
    )
    prompts: PrepareConfig | None = Field(
        default=None,
        title="prompts",
        description="Prepares the reasoning prompts; the held-out ones measure every policy.",
        json_schema_extra=AT_FIRST_ON,
    )
    zero: GrpoConfig | None = Field(default=None, title="zero", description="R1-Zero: RL on rules, from the base.")
    traces: SampleConfig | None = Field(
        default=None, title="traces", description="Draws the cold start's candidates from R1-Zero, else from the base."
    )
    cold_start_data: RejectionConfig | None = Field(
        default=None, title="cold_start_data", description="Keeps the readable ones among the traces."
    )
    cold_start: SftConfig | None = Field(
        default=None, title="cold_start", description="Fine-tunes the base on the cold start's data."
    )
    reasoning: GrpoConfig | None = Field(default=None, title="reasoning", description="RL on reasoning prompts.")
    iterations: int = Field(
        default=1,
        ge=1,
        title="Iterations",
        description="Outer iterations of reasoning RL: each goes on from the last one's checkpoint, which is its reference.",
    )
    samples: SampleConfig | None = Field(
        default=None, title="samples", description="Draws completions from the converged checkpoint."
    )
    accepted: RejectionConfig | None = Field(
        default=None, title="accepted", description="Keeps those that are right and readable."
    )
    general: PrepareConfig | None = Field(
        default=None, title="general", description="Prepares the general prompts, which no rule can judge."
    )
    general_demonstrations: PrepareConfig | None = Field(
        default=None, title="general_demonstrations", description="Prepares the demonstrations mixed into the step sft."
    )
    sft: SftConfig | None = Field(
        default=None, title="sft", description="Fine-tunes the base on the accepted samples and general demonstrations."
    )
    answers: SampleConfig | None = Field(
        default=None, title="answers", description="Draws completions of the general prompts, to be compared."
    )
    helpful_labels: LabelConfig | None = Field(
        default=None, title="helpful_labels", description="Who finds which answer more helpful."
    )
    helpful: RewardModelConfig | None = Field(default=None, title="helpful", description="Learns what is helpful.")
    harmless_labels: LabelConfig | None = Field(
        default=None, title="harmless_labels", description="Who finds which completion less harmful."
    )
    harmless: RewardModelConfig | None = Field(default=None, title="harmless", description="Learns what is harmless.")
    mixed: PrepareConfig = Field(
        default_factory=PrepareConfig,
        title="mixed",
        description="Joins reasoning and general prompts for the step second; its `rows` are the most it takes of either.",
    )
    second: GrpoConfig | None = Field(
        default=None, title="second", description="RL on all prompts, with rules and learned rewards."
    )
    student_base: SftConfig | None = Field(
        default=None, title="student_base", description="Trains the student's base on the corpus; left out when it is one."
    )
    distilled: DistillConfig | None = Field(
        default=None, title="distilled", description="Teaches the student with the accepted samples."
    )
    student_rl: GrpoConfig | None = Field(
        default=None, title="student_rl", description="The RL that the distilled student is compared with."
    )
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every policy is measured on reasoning prompts.")
    evaluate_general: EvaluateConfig | None = Field(
        default=None, title="evaluate_general", description="How policies are measured on general prompts, from sft on."
    )


@dataclass(frozen=True)
class Road:
    """A pipeline, its recipe, and the data that all of it is measured on."""

    pipeline: Pipeline
    recipe: R1Recipe
    prompts: Outputs
    general: Outputs | None

    def made(self, name: str, make: Callable[[], Source]) -> Source:
        """What is given in a step's place, else what the step makes, else nothing."""
        if (found := given(self.pipeline, self.recipe, name)) is not None:
            return found[STAGES[self.recipe.stage(name)].main]
        return make() if getattr(self.recipe, name) is not None else None

    def measured(self, name: str, policy: Source) -> Source:
        """Evaluate a policy, if there is one."""
        recipe = self.recipe
        if policy is not None:
            self.pipeline.step(f"evaluate-{name}", "evaluate", recipe.evaluate, policy=policy, prompts=self.prompts["heldout"])
        if policy is not None and self.general is not None and recipe.evaluate_general and name in ("sft", "second"):
            prompts = self.general["heldout"]
            self.pipeline.step(f"general-{name}", "evaluate", recipe.evaluate_general, policy=policy, prompts=prompts)
        return policy

    def step(self, name: str, stage: str, output: str, **sources: Source) -> Source:
        """The output of the step of a name."""
        config: Config = getattr(self.recipe, name)
        return self.pipeline.step(name, stage, config, **sources)[output]

    def sampled(self, name: str, policy: Source, prompts: Outputs) -> Source:
        """Completions of the policy, or of the teacher that the step names."""
        config: SampleConfig | None = getattr(self.recipe, name)
        drawn = None if config is not None and config.endpoint else policy
        return made(self.pipeline, self.recipe, name, policy=drawn, prompts=prompts["train"])["samples"]


def steps(pipeline: Pipeline, recipe: R1Recipe) -> None:
    """The steps in order."""
    prompts, general, corpus = dataset(pipeline, recipe, "prompts"), None, None
    if recipe.has("general"):
        general = dataset(pipeline, recipe, "general")
    if recipe.has("corpus"):
        corpus = dataset(pipeline, recipe, "corpus", exclude=prompts["heldout"])
    road = Road(pipeline, recipe, prompts, general)

    base = _base(road, "base", "model", corpus)
    zero = road.measured("zero", road.made("zero", lambda: _grpo(road, "zero", base)))
    cold_start = road.measured("cold_start", _cold_start(road, base, zero))
    start = cold_start or zero or base
    reasoning = road.measured("reasoning", road.made("reasoning", lambda: _grpo(road, "reasoning", start, recipe.iterations)))
    accepted = road.made("accepted", lambda: _accepted(road, reasoning or start))
    sft = road.measured("sft", road.made("sft", lambda: _sft(road, base, accepted)))
    second = road.measured("second", road.made("second", lambda: _second(road, sft or reasoning or start)))
    if recipe.distilled is not None or recipe.student_rl is not None:
        _student(road, corpus, accepted, second or sft or reasoning)


def _base(road: Road, step: str, model: str, corpus: Outputs | None) -> Source:
    """A base model that is given, or made here of the corpus."""

    def train() -> Source:
        assert corpus is not None
        parts = {"train": corpus["train"], "heldout": corpus["heldout"]}
        return road.step(step, "sft", "checkpoint", model=road.pipeline.input(model), **parts)

    return road.measured(step, road.made(step, train) or road.pipeline.input(model))


def _grpo(road: Road, name: str, policy: Source, iterations: int = 1, **more: Source) -> Source:
    config, given = getattr(road.recipe, name), {"prompts": road.prompts["train"], **more}
    for number in range(1, iterations + 1):
        policy = iteration(road.pipeline, name, config, number, policy, given)
    return policy


def _cold_start(road: Road, base: Source, zero: Source) -> Source:
    def data() -> Source:
        traces = road.sampled("traces", zero or base, road.prompts)
        return road.step("cold_start_data", "rejection", "train", samples=traces)

    def tune() -> Source:
        return road.step("cold_start", "sft", "checkpoint", model=base, train=road.made("cold_start_data", data))

    return road.made("cold_start", tune)


def _accepted(road: Road, policy: Source) -> Source:
    samples = road.sampled("samples", policy, road.prompts)
    return road.step("accepted", "rejection", "train", samples=samples)


def _sft(road: Road, base: Source, accepted: Source) -> Source:
    recipe, pipeline, rows = road.recipe, road.pipeline, accepted
    if recipe.has("general_demonstrations"):
        exclude = None if road.general is None else road.general["heldout"]
        others = dataset(pipeline, recipe, "general_demonstrations", exclude=exclude)
        rows = pipeline.step("sft_data", "prepare", PrepareConfig(), source=accepted, also=others["train"])["train"]
    return road.step("sft", "sft", "checkpoint", model=base, train=rows)


def _second(road: Road, policy: Source) -> Source:
    """RL on reasoning and general prompts, with the reward models that its rewards name."""
    pipeline, prompts, answers = road.pipeline, road.prompts["train"], None
    if road.general is not None:
        prompts = pipeline.step("mixed", "prepare", road.recipe.mixed, source=prompts, also=road.general["train"])["train"]
        if road.recipe.has("answers"):
            answers = road.sampled("answers", policy, road.general)
    helpful, harmless = (
        road.made(name, lambda name=name: _judge(road, name, policy, answers)) for name in ("helpful", "harmless")
    )
    return _grpo(road, "second", policy, prompts=prompts, reward_model=helpful, safety_model=harmless)


def _judge(road: Road, name: str, policy: Source, answers: Source) -> Source:
    labels = made(road.pipeline, road.recipe, f"{name}_labels", samples=answers)
    parts = {"train": labels["train"], "heldout": labels["heldout"]}
    return road.step(name, "reward_model", "checkpoint", model=policy, **parts)


def _student(road: Road, corpus: Outputs | None, accepted: Source, teacher: Source) -> None:
    """Distillation beside RL, from the same student."""
    recipe, student = road.recipe, _base(road, "student_base", "student", corpus)
    if recipe.distilled is not None:
        asked = teacher if recipe.distilled.objective != "likelihood" else None
        distilled = road.step("distilled", "distill", "checkpoint", model=student, train=accepted, teacher=asked)
        road.measured("distilled", distilled)
    if recipe.student_rl is not None:
        road.measured("student_rl", _grpo(road, "student_rl", student))


@recipe_flow
def r1(recipe: R1Recipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    return run_pipeline(recipe, steps, from_step)


DEFINITION = Definition(R1Recipe, r1, steps)
