"""Classic RLHF: a base model through supervised fine-tuning, a reward model and PPO or GRPO, measured on held-out prompts.

corpus -> base                                  only when the recipe makes its own base model
demonstrations -> sft
prompts -> samples -> labels -> reward_model    or, with preferences that exist already: preferences -> reward_model
sft, preferences -> dpo                         when the recipe has this step: RL then starts from its policy, not from sft
sft, reward_model, prompts -> ppo               with ptx, demonstrations mixed into its updates, when ppo.ptx is set
                              or grpo, grpo-2, ...   in outer iterations, each from the last one's checkpoint, its reference;
                              with refit, each after the first has a reward model that has seen the last one's samples too
prompts, reward_model -> evaluate-base, evaluate-sft, evaluate-dpo, evaluate-ppo or -grpo

With labels of steps (`labels.form: steps`, or such rows as preferences) the reward model is a process model. The rewards of
grpo then name it `process_model`, and those of evaluate may.

The dpo policy is a reward too, `implicit_reward` = beta log(dpo / sft) (rl4llm 7.3, eq. 45), which can teach grpo without a
reward model. Under a KL from sft of weight c in grpo's reward the optimum is sft (dpo / sft)^(beta / c): dpo itself where c is
beta. Under one from dpo it is dpo (dpo / sft)^(beta / c), beyond what any preference has said, and is soon hacked.

All data is prepared before anything is trained. The held-out prompts, which measure every model, are taken out of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from flows.beginning import BeginningRecipe, begin, both, prepared
from flows.forms import recipe_flow
from flows.inputs import RlhfInputs
from flows.iterations import again, iteration
from flows.places import dataset, made
from flows.runner import Definition, run_pipeline
from stages.rewards import REWARDS
from stages.specs.evaluate import EvaluateConfig
from stages.specs.grpo import GrpoConfig
from stages.specs.ppo import PpoConfig
from stages.specs.preference import PreferenceConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.reward_model import RewardModelConfig
from tasks.execute import StepResult
from tasks.pipeline import Pipeline, Source


class RlhfRecipe(BeginningRecipe):
    """SFT, a reward model of preferences, and PPO or GRPO against it; every model is measured on held-out prompts."""

    inputs: RlhfInputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=RlhfInputs, title="Inputs", description="What the steps begin with, by reference."
    )
    dpo: PreferenceConfig | None = Field(
        default=None,
        title="dpo",
        description="Learns from the preferences directly. RL then starts from its policy, and grpo's rewards may name "
        "`implicit_reward`, which reads it and the SFT model.",
    )
    reward_model: RewardModelConfig | None = Field(
        default=None,
        title="reward_model",
        description="Learns a reward from the preferences. Where grpo's rewards name neither it nor `process_model`, it can be "
        "left out, and only measures.",
    )
    ptx: PrepareConfig | None = Field(
        default=None, title="ptx", description="Prepares the demonstrations that PPO mixes into its updates, as ppo.ptx says."
    )
    ppo: PpoConfig | None = Field(
        default=None, title="ppo", description="Optimises the SFT or DPO model on the prompts by the learned reward."
    )
    grpo: GrpoConfig | None = Field(
        default=None,
        title="grpo",
        description="The same without a critic, in place of ppo; its rewards name `reward_model`, or `process_model` when the "
        "reward model learns from labels of steps.",
    )
    rl_reference: Literal["policy", "sft"] = Field(
        default="policy",
        title="Reference of RL",
        description="What ppo or grpo is kept near to: the policy that it starts from (dpo's, or the last iteration's), or "
        "always the SFT model: for `implicit_reward`, of which dpo's policy is the optimum under a KL of its beta from SFT.",
    )
    iterations: int = Field(
        default=1, ge=1, title="Iterations", description="Outer iterations of grpo, each from the last one."
    )
    refit: bool = Field(
        default=False,
        title="Refit",
        description="Before each iteration of grpo but the first: sample and label as the steps samples and labels do, and "
        "train the reward model anew on all preferences so far.",
    )
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every model is measured.")

    @model_validator(mode="after")
    def _possible(self) -> RlhfRecipe:
        if (self.ppo is None) == (self.grpo is None):
            raise ValueError("a recipe has either the step ppo or the step grpo")
        if self.grpo is None and (self.iterations > 1 or self.refit):
            raise ValueError("iterations and refit are grpo's; ppo keeps its reference")
        if self.refit and (self.samples is None or self.labels is None):
            raise ValueError("refit needs the steps samples and labels, which it repeats")
        if self.refit and self.reward_model is None and self.in_place("reward_model"):
            raise ValueError("refit needs the step reward_model, which it repeats, though the first reward model is given")
        labelled = self.refit or (self.reads_preferences and self.labels_samples)
        if self.labels is not None and labelled and (self.labels.form == "steps") != self.learns_steps:
            raise ValueError(
                "labels.form: steps makes a process model, which only grpo with the reward `process_model` can use: have both "
                "or neither"
            )
        if {"reward_model", "process_model"} <= self.named:
            raise ValueError("grpo.rewards name reward_model and process_model, and the recipe makes one: leave one out")
        if not self.has("reward_model") and (self.ppo is not None or self.named & {"reward_model", "process_model"}):
            raise ValueError(
                "the step reward_model is missing: ppo, or a reward of grpo, reads what it makes; in its place there may be "
                "inputs.reward_model"
            )
        if self.refit and not self.named & {"reward_model", "process_model"}:
            raise ValueError("refit trains the reward model anew, which grpo.rewards do not name: leave it out")
        if self.makes("dpo") and self.learns_steps:
            raise ValueError(
                "dpo learns from comparisons of completions, and a process model from labels of steps: leave one out"
            )
        if self.implicit and not self.in_place("dpo") and (self.dpo is None or not self.dpo.objective.feeding.reference):
            raise ValueError(
                "implicit_reward is what the step dpo has learnt, relative to its reference: have that step, with an objective "
                "that has a reference, or give such a model as inputs.dpo"
            )
        if not self.rates_steps and self.measures_steps:
            raise ValueError("evaluate.rewards name process_model, which the recipe does not make: grpo.rewards do not name it")
        if (self.ppo is None or self.ppo.ptx is None) and (self.ptx or self.inputs.ptx or self.inputs.ptx_train):
            raise ValueError(
                "the recipe gives demonstrations for PPO-ptx, but ppo.ptx, which says how to mix them in, is not set"
            )
        return self

    @property
    def rates_steps(self) -> bool:
        """Whether the reward model is a process model, as grpo's rewards say."""
        return "process_model" in self.named

    @property
    def trains_reward(self) -> bool:
        """Whether any reward model is trained here."""
        return self.refit or self.makes("reward_model")

    @property
    def learns_steps(self) -> bool:
        """Whether that is a process model, which learns from labels of steps."""
        return self.rates_steps and self.trains_reward

    @property
    def reads_preferences(self) -> bool:
        return self.trains_reward or self.makes("dpo")

    @property
    def reads_demonstrations(self) -> bool:
        return super().reads_demonstrations or self.reads_samples

    @property
    def reads_samples(self) -> bool:
        return self.trains_reward and not self.rates_steps

    @property
    def measures_steps(self) -> bool:
        """Whether the policies are measured by it too."""
        return any(reward.name == "process_model" for reward in self.evaluate.rewards)

    @property
    def named(self) -> set[str]:
        """The rewards of grpo."""
        return {reward.name for reward in self.grpo.rewards} if self.grpo is not None else set()

    @property
    def implicit(self) -> bool:
        """Whether the implicit reward teaches or measures."""
        return "implicit_reward" in self.named | {reward.name for reward in self.evaluate.rewards}


def steps(pipeline: Pipeline, recipe: RlhfRecipe) -> None:
    """The steps in order."""
    data = prepared(pipeline, recipe)
    if recipe.ppo is not None and recipe.ppo.ptx is not None:
        data["ptx"] = dataset(pipeline, recipe, "ptx", exclude=data["prompts"]["heldout"], default=PrepareConfig())
    begun = begin(pipeline, recipe, data)
    prompts, sft = data["prompts"], begun.sft
    models = Models(sft, sft)
    if recipe.has("dpo"):
        tuned = made(pipeline, recipe, "dpo", policy=sft, **both(begun.preferences))
        models = replace(models, start=tuned["checkpoint"])
    learnt_from: dict[str, Source] = both(begun.preferences)
    if not recipe.rates_steps and "demonstrations" in data:
        learnt_from["demonstrations"] = data["demonstrations"]["train"]
    if not recipe.rates_steps:
        learnt_from["samples"] = begun.samples
    if recipe.has("reward_model"):
        learnt = made(pipeline, recipe, "reward_model", model=sft, **learnt_from)
        models = replace(models, reward=learnt["checkpoint"])

    def measure(name: str, policy: Source, before: Source) -> None:
        judges = models.judges(reward.name for reward in recipe.evaluate.rewards)
        if not recipe.rates_steps:
            judges["reward_model"] = models.reward
        sources = {"policy": policy, "prompts": prompts["heldout"], "reference": before, "opponent": before}
        pipeline.step(f"evaluate-{name}", "evaluate", recipe.evaluate, **sources, **judges)

    if begun.base is not None:
        measure("base", begun.base, None)
    measure("sft", sft, begun.base)
    if recipe.has("dpo"):
        measure("dpo", models.start, sft)
    if recipe.ppo is not None:
        ptx = data["ptx"]["train"] if "ptx" in data else None
        reference = sft if recipe.rl_reference == "sft" else models.start
        given = {"policy": models.start, "reward": models.reward, "reference": reference}
        ppo = pipeline.step("ppo", "ppo", recipe.ppo, prompts=prompts["train"], ptx=ptx, **given)
        measure("ppo", ppo["checkpoint"], sft)
    else:
        measure("grpo", _grpo(pipeline, recipe, prompts["train"], models, learnt_from), sft)


@dataclass(frozen=True)
class Models:
    """What RL begins with: `start` is the policy that it starts from, dpo's or else sft."""

    sft: Source
    start: Source
    reward: Source = None

    def judges(self, rewards: Iterable[str]) -> dict[str, Source]:
        """The models that some rewards read, by their ports."""
        made = {"reward_model": self.reward, "process_model": self.reward}
        made |= {"preference_model": self.start, "preference_reference": self.sft}
        return {port: made.get(port) for name in rewards for port in REWARDS[name].ports.values()}


def _grpo(pipeline: Pipeline, recipe: RlhfRecipe, prompts: Source, models: Models, learnt_from: Mapping[str, Source]) -> Source:
    """The policy after all outer iterations; with refit each but the first has a reward model of its own."""
    assert recipe.grpo is not None
    policy, reference = models.start, models.sft if recipe.rl_reference == "sft" else None
    for number in range(1, recipe.iterations + 1):
        if number > 1 and recipe.refit and recipe.reward_model is not None:
            learnt_from = _relabelled(pipeline, recipe, number, policy, prompts, learnt_from)
            again_learnt = pipeline.step(
                f"reward_model-{number}", "reward_model", recipe.reward_model, model=models.sft, **learnt_from
            )
            models = replace(models, reward=again_learnt["checkpoint"])
        inputs = {"prompts": prompts, "reference": reference, **models.judges(recipe.named)}
        policy = iteration(pipeline, "grpo", recipe.grpo, number, policy, inputs)
    return policy


def _relabelled(
    pipeline: Pipeline, recipe: RlhfRecipe, number: int, policy: Source, prompts: Source, learnt_from: Mapping[str, Source]
) -> dict[str, Source]:
    """What a reward model learns from that knows the policy as it is now: all preferences so far, and those of new samples."""
    assert recipe.samples is not None
    assert recipe.labels is not None
    config = again(recipe.samples, number)
    samples = pipeline.step(f"samples-{number}", "sample", config, policy=policy, prompts=prompts)["samples"]
    labels = pipeline.step(f"labels-{number}", "label", again(recipe.labels, number), samples=samples)["train"]
    both = {"source": learnt_from["train"], "also": labels}
    # The policy may have said nothing, and lost by it.
    preferences = pipeline.step(f"preferences-{number}", "prepare", PrepareConfig(keep_empty=True), **both)["train"]
    more = {} if recipe.rates_steps else {"samples": samples}
    return {**learnt_from, "train": preferences, **more}


@recipe_flow
def rlhf(recipe: RlhfRecipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    return run_pipeline(recipe, steps, from_step)


DEFINITION = Definition(RlhfRecipe, rlhf, steps)
