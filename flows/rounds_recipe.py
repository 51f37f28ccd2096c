"""The recipe of rounds: what is sampled, who labels, what learns from the labels, and what a candidate must show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flows.inputs import RoundsInputs
from flows.recipe import Recipe
from stages.rewards import REWARDS
from stages.specs.answers import AnswersConfig
from stages.specs.base import Config
from stages.specs.evaluate import EvaluateConfig
from stages.specs.grpo import GrpoConfig
from stages.specs.label import LabelConfig
from stages.specs.ppo import PpoConfig
from stages.specs.preference import PreferenceConfig
from stages.specs.prepare import PrepareConfig
from stages.specs.questions import QuestionsConfig
from stages.specs.reward_model import RewardModelConfig
from stages.specs.sample import SampleConfig
from stages.specs.sft import SftConfig
from tasks.promote import Gate


class Stream(Config):
    """How the training prompts are dealt out to rounds."""

    per_round: int = Field(default=500, ge=1, title="Prompts a round", description="Fresh prompts that a round samples.")
    seed: int = Field(
        default=0, title="Seed", description="Of the order in which prompts come. No prompt comes again before all have come."
    )


class RoundsRecipe(Recipe):
    """What a round does, and where the first one begins."""

    inputs: RoundsInputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=RoundsInputs, title="Inputs", description="What rounds begin with."
    )
    champion: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w-]*$",
        title="Champion",
        description="The registered model whose alias `champion` is taken and moved; NAME-champion of the recipe's name when "
        "unset.",
    )
    corpus: PrepareConfig | None = Field(
        default=None, title="corpus", description="Prepares the corpus of a base model made here, in the first round."
    )
    base: SftConfig | None = Field(
        default=None, title="base", description="Trains a base model on the corpus, in the first round; else `model` is one."
    )
    demonstrations: PrepareConfig | None = Field(
        default=None,
        title="demonstrations",
        description="Prepares demonstrations, for the step sft, and to shift reward models so that these average 0.",
    )
    sft: SftConfig | None = Field(
        default=None,
        title="sft",
        description="Makes the first champion of a base model, in the first round; left out when `model` is one already.",
    )
    prompts: PrepareConfig = Field(
        title="prompts", description="Prepares the prompts: the held-out part measures, the training part is the stream."
    )
    stream: Stream = Field(default_factory=Stream, title="Stream", description="How prompts are dealt out to rounds.")
    samples: SampleConfig = Field(title="samples", description="Draws the champion's completions of the round's prompts.")
    labels: LabelConfig | None = Field(
        default=None,
        title="labels",
        description="Makes preferences of them: by a verifier, a judge behind an endpoint or, without a `reward`, the input "
        "reward_model. Left out when people label.",
    )
    questions: QuestionsConfig | None = Field(
        default=None,
        title="questions",
        description="People label, in place of the step labels: the round writes questions and a page, waits without holding a "
        "worker, and goes on when it is started with their `labels`.",
    )
    answers: AnswersConfig = Field(
        default_factory=AnswersConfig, title="answers", description="Makes preferences of what people answered."
    )
    preferences: PrepareConfig | None = Field(
        default=None, title="preferences", description="Prepares the input of this name, in the first round."
    )
    reward_model: RewardModelConfig | None = Field(
        default=None,
        title="reward_model",
        description="Learns from all preferences so far. Left out, the input of this name is taken wherever one is needed.",
    )
    reward_model_from: Literal["champion", "first", "last"] = Field(
        default="champion",
        title="Reward model from",
        description="Where it starts: anew from the champion, or from the first round's model; or going on from the last "
        "round's reward model (in the first round from the input reward_model, or else from the champion).",
    )
    ppo: PpoConfig | None = Field(
        default=None, title="ppo", description="Optimises by the reward model, on the round's prompts."
    )
    grpo: GrpoConfig | None = Field(
        default=None, title="grpo", description="In place of ppo: by its rewards, of which one may be `reward_model`."
    )
    preference: PreferenceConfig | None = Field(
        default=None, title="preference", description="In place of these: learns from the preferences directly."
    )
    learn_from: Literal["round", "all"] = Field(
        default="round",
        title="Preferences to learn from",
        description="The step preference's: the round's own, which are of the champion's completions, or all so far.",
    )
    reference: Literal["champion", "first"] = Field(
        default="champion",
        title="Reference",
        description="What optimisation is kept near to, and the KL is measured from: the champion, so that each round has a "
        "budget of KL of its own, or the model that the first round began with, so that all rounds share one.",
    )
    evaluate: EvaluateConfig = Field(title="evaluate", description="How champion and candidate are measured.")
    gate: Gate = Field(default_factory=Gate, title="Gate", description="When the candidate takes the champion's place.")

    @model_validator(mode="after")
    def _possible(self) -> RoundsRecipe:
        if sum(step is not None for step in (self.ppo, self.grpo, self.preference)) != 1:
            raise ValueError("a recipe of rounds has one of the steps ppo, grpo and preference")
        if (self.labels is None) == (self.questions is None):
            raise ValueError(
                "either the step labels makes the preferences, or people do by the step questions: have one of them"
            )
        if self.labels is not None and self.labels.form == "steps":
            raise ValueError("labels.form: steps is for process models, which rounds do not train: use pairs or rankings")
        if self.labels is not None and self.labels.reward is None and "reward_model" not in self.given():
            raise ValueError("labels need a `reward`, or the input reward_model, which then labels")
        if self.samples.endpoint is not None:
            raise ValueError("samples.endpoint: a round samples its champion, not a teacher; leave it out")
        if self.prompts.heldout == 0:
            raise ValueError("prompts.heldout: champion and candidate are measured on held-out prompts; give it a share, as .1")
        if self.sft is not None and self.demonstrations is None:
            raise ValueError("the step sft needs the step demonstrations")
        if self.base is not None and (self.sft is None or self.corpus is None):
            raise ValueError("the step base needs the step corpus, and the step sft, which goes on from it")
        for reward in (*self.evaluate.rewards, *(self.grpo.rewards if self.grpo else ())):
            if set(REWARDS[reward.name].ports.values()) - {"reward_model"}:
                raise ValueError(f"rounds make no model for the reward {reward.name}: leave it out")
        learned = self.reward_model is not None or "reward_model" in self.given()
        if not learned and (self.ppo is not None or "reward_model" in self.rewards):
            raise ValueError(
                "ppo, or a reward of grpo, reads a reward model: have the step reward_model or the input of this name"
            )
        if not learned and self.evaluate.judge is None:
            raise ValueError("nothing decides who wins: set evaluate.judge, or have a reward model")
        return self

    @property
    def rewards(self) -> set[str]:
        """The rewards of grpo."""
        return {reward.name for reward in self.grpo.rewards} if self.grpo is not None else set()

    @property
    def name_of_champion(self) -> str:
        """The registered model whose alias moves."""
        return self.champion or f"{self.name}-champion"

    @property
    def main(self) -> str:
        """The metric that a round's table and plot show first."""
        if self.evaluate.verifier is not None:
            return "accuracy"
        return f"rewards.{self.evaluate.rewards[0].name}" if self.evaluate.rewards else "reward"
