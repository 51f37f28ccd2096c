"""Small configs that several stages share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, field_validator

from stages.specs.base import Config

Dtype = Literal["float32", "bfloat16"]


class Optimizer(Config):
    """AdamW and its schedule. Defaults of Tulu 3's SFT (arXiv 2411.15124, table 9): 5e-6, linear, 3% warm-up, no decay."""

    lr: float = Field(default=5e-6, gt=0, title="Learning rate", description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        title="Schedule",
        description="How the learning rate goes from its peak to 0 (or stays) after the warm-up.",
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, title="Warm-up", description="Share of the steps in which the rate rises from 0."
    )
    weight_decay: float = Field(default=0.0, ge=0, title="Weight decay", description="AdamW's decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, title="Beta 1", description="AdamW's first-moment decay.")
    beta2: float = Field(default=0.999, ge=0, lt=1, title="Beta 2", description="AdamW's second-moment decay.")
    eps: float = Field(default=1e-8, gt=0, title="Epsilon", description="AdamW's denominator term.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, title="Gradient clip", description="Largest global gradient norm of a step."
    )


class Sampling(Config):
    """How completions are drawn. Temperature 1 with nothing cut off is the policy itself, as RL needs it."""

    temperature: float = Field(
        default=1.0, ge=0, title="Temperature", description="Divides the logits; 0 takes the likeliest token."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, title="Top p", description="Keep the smallest set of tokens with this probability."
    )
    top_k: int = Field(default=0, ge=0, title="Top k", description="Keep the k likeliest tokens; 0 keeps all.")
    max_new_tokens: int = Field(
        default=512, ge=1, title="New tokens", description="A completion without EOS is truncated here."
    )


class RewardRef(Config):
    """A reward by name, with its arguments. Its version is identity: see `stages/rewards`."""

    LEARNED: ClassVar[bool] = False

    name: str = Field(title="Reward", description="A name registered in stages/rewards.")
    args: dict[str, JsonValue] = Field(default_factory=dict, title="Arguments", description="Keyword arguments of the reward.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from stages.rewards import REWARDS

        if name not in REWARDS:
            raise ValueError(f"no reward is named {name!r}; there are {', '.join(sorted(REWARDS))}")
        if REWARDS[name].port is not None and not cls.LEARNED:
            raise ValueError(f"{name!r} is a part of a mixed reward; here a reward model is an input of the stage")
        return name

    def identity(self) -> dict[str, Any]:
        from stages.rewards import REWARDS

        return super().identity() | {"version": REWARDS[self.name].version}


class WeightedReward(RewardRef):
    """One part of a mixed reward."""

    LEARNED: ClassVar[bool] = True

    weight: float = Field(default=1.0, title="Weight", description="Of this part in the sum; 0: it is only reported.")
    where: dict[str, str] = Field(
        default_factory=dict,
        title="Where",
        description="Column: value; only for rows whose column, as text, is this. Empty: for all rows.",
    )
    label: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        title="Label",
        description="What its metric `rewards.LABEL` is called; the reward's name when not given.",
    )

    @property
    def key(self) -> str:
        return self.label or self.name

    @property
    def decides(self) -> bool:
        """Whether anything but a report depends on it."""
        return self.weight != 0
