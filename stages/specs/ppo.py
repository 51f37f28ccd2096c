"""`ppo`: reinforcement learning from a reward model, with a critic and a KL penalty to a reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.specs.base import OPERATIONAL, Config, Port, Runtime, StageSpec
from stages.specs.common import Dtype, Optimizer, Sampling


class Scoring(Config):
    """What becomes of a reward model's score before it is the reward of the last token."""

    clip: float | None = Field(default=None, gt=0, title="Clip", description="Hold scores within plus and minus this.")
    missing_eos_penalty: float = Field(
        default=1.0, ge=0, title="Missing EOS", description="Taken off the score of a completion that was cut off without EOS."
    )
    whiten: bool = Field(
        default=False,
        title="Whiten rewards",
        description="Scale the rewards of all tokens of a step to unit variance; their mean stays.",
    )


class Critic(Config):
    """The value model (rl4llm 3.2.3): where it starts, how it learns."""

    start: Literal["reward", "policy"] = Field(
        default="reward",
        title="Start",
        description="From the reward model (InstructGPT), or from the policy with a head of zeros. A critic given as an input "
        "is taken instead.",
    )
    shared: bool = Field(
        default=False,
        title="Shared backbone",
        description="A second head on the policy's own backbone (rl4llm 4.3.6), which then learns from both losses. The head "
        "starts from zeros, or from a critic given as an input if that has the policy's backbone; `start` is not used.",
    )
    coefficient: float = Field(
        default=1.0,
        gt=0,
        title="Coefficient",
        description="Weight of the value loss beside the policy's (c1 of eq. 33), which matters to a shared backbone. Huang et "
        "al. use 0.1.",
    )
    clip: float | None = Field(
        default=0.2, gt=0, title="Value clip", description="Values further than this from the old ones gain nothing."
    )
    optimizer: Optimizer = Field(
        default_factory=lambda: Optimizer(lr=3e-6, warmup=0.0, eps=1e-5),
        title="Optimizer",
        description="The critic's AdamW, of its head alone when the backbone is shared.",
    )


class OldPolicyKl(Config):
    """The penalty of the trust regions `adaptive_kl` and `fixed_kl` (rl4llm 4.3.7, eq. 29, 32), in nats a token."""

    coefficient: float = Field(
        default=1.0, gt=0, title="Coefficient", description="Weight of KL(old || policy); where adaptive_kl starts."
    )
    target: float = Field(
        default=0.01, gt=0, title="Target", description="adaptive_kl halves or doubles the weight to keep to this."
    )


class Ptx(Config):
    """Demonstrations mixed into the updates (PPO-ptx, eq. 14)."""

    weight: float = Field(
        default=27.8,
        gt=0,
        title="Weight",
        description="Of their negative log-likelihood, a mean over tokens as the policy's loss is (InstructGPT, C.4: 27.8).",
    )
    batch_size: int = Field(
        default=512, ge=1, title="Batch", description="Demonstrations an optimizer step, over all processes."
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion", title="Loss on", description="completion: prompts carry no loss; all: language modelling."
    )
    max_length: int = Field(
        default=1024, ge=2, title="Longest sequence", description="Tokens of prompt and completion together."
    )
    too_long: Literal["drop", "truncate"] = Field(
        default="truncate", title="Too long", description="Longer sequences are dropped, or cut (then without EOS)."
    )


class PpoConfig(Config):
    """Defaults follow Huang et al., The N+ Implementation Details of RLHF with PPO (arXiv 2403.17031), at temperature 1."""

    seed: int = Field(default=0, title="Seed", description="Seed of the prompts' order, the samples and the minibatches.")
    steps: int = Field(default=1000, ge=1, title="Steps", description="Rounds of sampling and updating.")
    batch_size: int = Field(default=512, ge=2, title="Batch", description="Completions a step, over all processes.")
    sampling: Sampling = Field(default_factory=Sampling, title="Sampling", description="How completions are drawn.")
    reference_kl: float = Field(
        default=0.05,
        ge=0,
        title="Reference KL",
        description="Weight of log(policy / reference) at each token in the reward (eq. 7; k1: in a reward, k2 and k3 have not "
        "the gradient of a KL).",
    )
    scoring: Scoring = Field(default_factory=Scoring, title="Scoring", description="From score to reward.")
    gamma: float = Field(default=1.0, gt=0, le=1, title="Gamma", description="Discount a token (eq. 25).")
    lam: float = Field(default=0.95, ge=0, le=1, title="Lambda", description="GAE's trade of bias for variance (eq. 25).")
    bootstrap: Literal["zero", "value"] = Field(
        default="zero",
        title="After a truncated completion",
        description="zero: it counts as ended, its penalty is part of the reward; value: what the critic expects to follow.",
    )
    epochs: int = Field(default=4, ge=1, title="Epochs", description="Passes over a step's completions.")
    minibatches: int = Field(default=1, ge=1, title="Minibatches", description="Optimizer steps a pass.")
    trust_region: Literal["clip", "adaptive_kl", "fixed_kl", "none"] = Field(
        default="clip", title="Trust region", description="What keeps an update near the old policy (rl4llm 4.3.7)."
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, title="Clip low", description="The ratio is held above 1 minus this.")
    clip_high: float = Field(default=0.2, gt=0, title="Clip high", description="The ratio is held below 1 plus this.")
    old_policy_kl: OldPolicyKl = Field(
        default_factory=OldPolicyKl, title="Old-policy KL", description="For adaptive_kl and fixed_kl."
    )
    entropy_bonus: float = Field(
        default=0.0, ge=0, title="Entropy bonus", description="Weight of the policy's entropy a token (eq. 33)."
    )
    whiten_advantages: bool = Field(
        default=True, title="Whiten advantages", description="Zero mean and unit variance over all tokens of a step."
    )
    critic: Critic = Field(default_factory=Critic, title="Critic", description="The value model.")
    optimizer: Optimizer = Field(
        default_factory=lambda: Optimizer(lr=3e-6, warmup=0.0, eps=1e-5), title="Optimizer", description="The policy's AdamW."
    )
    ptx: Ptx | None = Field(
        default=None, title="PPO-ptx", description="Mix the demonstrations given as the input `ptx` into the updates (eq. 14)."
    )
    dtype: Dtype = Field(
        default="float32",
        title="Compute type",
        description="bfloat16 multiplies matrices in it; weights, optimizer, log-probs, values and losses stay float32.",
    )
    runtime: Runtime = Field(
        default_factory=lambda: Runtime(save_every=10, log_every=1),
        title="Runtime",
        description="Use of the machine; not identity.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _possible(self) -> PpoConfig:
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches ({self.minibatches}) cannot be more than batch_size ({self.batch_size})")
        if self.sampling.temperature == 0 or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError("sampling must draw from the policy itself: a temperature above 0, top_p 1 and top_k 0")
        return self


SPEC = StageSpec(
    name="ppo",
    version=1,
    config=PpoConfig,
    inputs={
        "policy": Port("model"),
        "reward": Port("model"),
        "prompts": Port("dataset"),
        "reference": Port("model", required=False),
        "critic": Port("model", required=False),
        "ptx": Port("dataset", required=False),
    },
    outputs={"checkpoint": "model", "critic": "model", "rollouts": "dataset"},
    headline=("reward", "kl", "length"),
    distributed=True,
)
