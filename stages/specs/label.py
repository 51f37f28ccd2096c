"""`label`: preferences from samples, or labels of their steps, given by a reward, a verifier, a learned reward model, or a
noisy hidden function; or SPIN's pairs, in which each sample loses to the demonstration of its prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.specs.base import OPERATIONAL, Config, Port, Runtime, StageSpec
from stages.specs.common import Dtype, RewardRef


class LabelConfig(Config):
    """Who prefers, how surely, and in which form it is written down."""

    seed: int = Field(default=0, title="Seed", description="Seed of the labeller's noise; each sample has its own.")
    reward: RewardRef | None = Field(
        default=None,
        title="Reward",
        description="Whose scores make the preferences; left out when a reward model, or demonstrations that win against every "
        "sample (SPIN), are given as an input.",
    )
    form: Literal["pairs", "rankings", "steps"] = Field(
        default="pairs",
        title="Form",
        description="pairs: chosen and rejected, with the margin; rankings: all of a prompt's completions with their ranks; "
        "steps: each completion's steps, as a reward that rates steps finds them, with its scores of them from 0 to 1. Nothing "
        'stands between these: train on them with `step_separator: ""`.',
    )
    pairs: Literal["all", "extremes"] = Field(
        default="all",
        title="Which pairs",
        description="all: every two completions of a prompt; extremes: the best against the worst alone.",
    )
    segments: bool = Field(
        default=False,
        title="Segments",
        description="With `form: pairs`, and a reward that rates steps: both completions' steps and the scores of these, as "
        "two_d_dpo learns from them. The pairs are the same; one has none where the reward rates no steps of a completion. No "
        "score may be below 0, and a step of score 0 moves nothing.",
    )
    part: Literal["completion", "answer"] = Field(
        default="completion",
        title="Part",
        description="answer: the annotator, and the preferences, see only the final answer, not the thinking before it.",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        title="Noise",
        description="Scale of the Gumbel noise on each score: a pair is then ordered as Bradley and Terry say, "
        "the higher first with probability sigmoid(difference / noise), a ranking as Plackett and Luce say. 0: no noise.",
    )
    tie_within: float = Field(
        default=0.0,
        ge=0,
        title="Tie within",
        description="Scores that differ by no more, before the noise, are tied: no pair is made of them.",
    )
    heldout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        title="Held-out share",
        description="Share of prompts whose preferences are held out, by a hash of the prompt, so that none changes sides.",
    )
    dtype: Dtype = Field(
        default="float32", title="Weights' type", description="Type a reward model is loaded in; its scores are float32 always."
    )
    runtime: Runtime = Field(
        default_factory=Runtime, title="Runtime", description="Use of the machine; not identity.", json_schema_extra=OPERATIONAL
    )

    @model_validator(mode="after")
    def _possible(self) -> LabelConfig:
        if self.form == "steps" and (self.reward is None or self.noise or self.tie_within):
            raise ValueError(
                "form: steps needs a `reward` that rates steps, and neither noise nor tie_within, which are for comparisons"
            )
        if self.segments and (self.form != "pairs" or self.reward is None):
            raise ValueError("segments are those of pairs: they need `form: pairs` and a `reward` that rates steps")
        return self


SPEC = StageSpec(
    name="label",
    version=1,
    config=LabelConfig,
    inputs={
        "samples": Port("dataset"),
        "reward_model": Port("model", required=False),
        "demonstrations": Port("dataset", required=False),
    },
    outputs={"train": "dataset", "heldout": "dataset"},
    headline=("rows_train", "rows_heldout", "agreement"),
)
