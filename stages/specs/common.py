"""Small configs that several stages share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from stages.specs.base import OPERATIONAL, Config, Port
from stages.specs.texts import Arguments, Texts

Dtype = Literal["float32", "bfloat16"]
Reduce = Literal["min", "product", "mean", "last"]
# Errors of these types do not repeat what was given: it may be a key.
UNSAID = ("secret_ref", "reward_arguments", "text_mapping")
# The models that the parts of a mixed reward read (`RewardEntry.ports`), as inputs of the stages that mix rewards.
JUDGES = {
    name: Port("model", required=False)
    for name in ("reward_model", "safety_model", "process_model", "preference_model", "preference_reference")
}


def _variable(name: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
        raise PydanticCustomError(
            "secret_ref",
            "give the name of an environment variable (capitals, digits and _) that holds it, never the key itself",
        )
    return name


SecretRef = Annotated[str, AfterValidator(_variable)]


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


class LoRA(Config):
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank B A, of which only A and B learn. B starts at 0, A within
    1 / sqrt(its inputs). Alpha and targets as in "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025), the rank as
    in that lab's Tinker. Its best learning rate is about ten times that of all weights, at every rank."""

    rank: int = Field(
        default=32,
        ge=1,
        le=1024,
        title="Rank",
        description="Rows of A: how much can be learned. A layer then learns rank x (inputs + outputs) numbers.",
    )
    alpha: float = Field(
        default=32.0,
        gt=0,
        title="Alpha",
        description="B A is multiplied by alpha / rank, so that the best learning rate hardly depends on the rank.",
    )
    targets: (
        Annotated[Literal["all-linear"], Field(title="All")]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, title="By name")]
    ) = Field(
        default="all-linear",
        title="Targets",
        description="The layers that get adapters, by the ends of their names, such as [q_proj, v_proj]; all-linear: every "
        "linear layer but the head.",
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


class Endpoint(Config):
    """A model behind an OpenAI-compatible endpoint: a service, or a server of one's own (vLLM, llama.cpp, transformers serve).
    Its answers are kept by content: the same question to a model of this name is never asked twice."""

    model: str = Field(
        min_length=1,
        title="Model",
        description="The model's name at the endpoint, which stands for its weights: other weights need another name.",
    )
    url: str = Field(
        pattern=r"^https?://[^\s@?#]+$",
        title="URL",
        description="Where it is served, up to /v1: http://localhost:8000/v1.",
        json_schema_extra=OPERATIONAL,
    )
    api_key: SecretRef | None = Field(
        default=None,
        title="Key",
        description="The environment variable that holds the key; unset for servers that ask for none.",
        json_schema_extra=OPERATIONAL,
    )
    extra_body: Arguments = Field(
        default_factory=dict,
        title="Further fields",
        description="Fields of a request beside the usual ones, or in their place, as name: value, name: value "
        "(reasoning_effort: low); null: left out.",
    )
    timeout: float = Field(
        default=120.0, gt=0, title="Timeout", description="Seconds to wait for an answer.", json_schema_extra=OPERATIONAL
    )
    retries: int = Field(
        default=4,
        ge=0,
        title="Retries",
        description="Tries after the first when no answer comes, or 429 or 5xx, with longer and longer waits between.",
        json_schema_extra=OPERATIONAL,
    )
    concurrency: int = Field(
        default=8,
        ge=1,
        title="Side by side",
        description="Requests on their way at a time, by each process.",
        json_schema_extra=OPERATIONAL,
    )


class ProcessArgs(Config):
    """How the reward `process_model` finds a completion's steps, and what it makes of their scores."""

    steps: str | None = Field(
        default=None,
        min_length=1,
        title="Steps",
        description="Regular expression whose match ends a step; blank pieces join the step before. When unset: what stood "
        "between the steps that the model was trained on.",
    )
    reduce: Reduce = Field(
        default="min",
        title="Reduce",
        description="The completion's score by those of its steps, the probabilities that they are right: min (Math-Shepherd, "
        "arXiv 2312.08935), product (that all are right; Lightman et al., arXiv 2305.20050), mean or last.",
    )

    @field_validator("steps")
    @classmethod
    def _ends_something(cls, steps: str | None) -> str | None:
        try:
            if steps is not None and re.fullmatch(steps, ""):
                raise ValueError(f"{steps!r} also matches an empty text, so a step would end at every character")
        except re.error as error:
            raise ValueError(f"{steps!r} is no regular expression: {error}") from error
        return steps


class ImplicitArgs(Config):
    """What the reward `implicit_reward` makes of its two models' log-probs (rl4llm eq. 45, without its log Z, which is the same
    for all completions of a prompt)."""

    beta: float = Field(gt=0, title="Beta", description="Reward = beta log(pi / ref): as a rule that of the preference model.")
    per_token: bool = Field(
        default=False,
        title="A token",
        description="The mean over the completion's tokens in place of their sum, as ipo and length_normalised_dpo train.",
    )


class RewardRef(Config):
    """A reward by name, with its arguments. Its version is identity: see `stages/rewards`."""

    PORTS: ClassVar[Sequence[str]] = ()

    name: str = Field(title="Reward", description="A name registered in stages/rewards.")
    args: Arguments = Field(
        default_factory=dict, title="Arguments", description="Of the reward, as name: value, name: value (part: answer)."
    )
    timeout: float = Field(
        default=10.0,
        gt=0,
        title="Timeout",
        description="Seconds a completion, for rewards that run in worker processes (math, reasoning_gym): after that it has "
        "no reward, and counts under the metric `notes.NAME.timeout`. Identity there: another limit gives other rewards.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from stages.rewards import REWARDS

        if name not in REWARDS:
            raise ValueError(f"no reward is named {name!r}; there are {', '.join(sorted(REWARDS))}")
        if not set(REWARDS[name].ports.values()) <= set(cls.PORTS):
            raise ValueError(f"{name!r} is a part of a mixed reward; here a reward model is an input of the stage")
        return name

    @field_validator("args")
    @classmethod
    def _fitting(cls, args: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        from stages.rewards import REWARDS

        try:
            if "name" in info.data:
                REWARDS[info.data["name"]].parse(args)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()]
            raise PydanticCustomError("reward_arguments", "{wrong}", {"wrong": "; ".join(wrong)}) from None
        return args

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        from stages.rewards import REWARDS

        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        known = sorted(name for name, entry in REWARDS.items() if set(entry.ports.values()) <= set(cls.PORTS))
        handler.resolve_ref_schema(schema)["properties"]["name"]["enum"] = known
        return schema

    def identity(self) -> dict[str, Any]:
        from stages.rewards import REWARDS

        entry, found = REWARDS[self.name], super().identity()
        if not entry.pooled:
            del found["timeout"]
        if (parsed := entry.parse(self.args)) is not None:
            found["args"] = parsed.identity()
        return found | {"version": entry.version}


class WeightedReward(RewardRef):
    """One part of a mixed reward."""

    PORTS: ClassVar[Sequence[str]] = tuple(JUDGES)

    weight: float = Field(default=1.0, title="Weight", description="Of this part in the sum; 0: it is only reported.")
    where: Texts = Field(
        default_factory=dict,
        title="Where",
        description="column: value, column: value (domain: general): only for rows with these, as text. Empty: for all rows.",
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


def require_distinct(rewards: Sequence[WeightedReward]) -> None:
    """Raise ValueError when two parts of a mixed reward have one name."""
    keys = [reward.key for reward in rewards]
    if len(set(keys)) < len(keys):
        raise ValueError(f"rewards: {', '.join(keys)}: two have one name; tell them apart with `label`")
