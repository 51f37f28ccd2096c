"""`sft`: supervised fine-tuning, also the way a base model is trained from random weights (loss on all tokens)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.specs.base import OPERATIONAL, Config, Port, Runtime, StageSpec
from stages.specs.common import Dtype, Optimizer, Sampling


class SftConfig(Config):
    """Defaults follow Tulu 3's SFT (arXiv 2411.15124, table 9): 2 epochs of 128 sequences of up to 4096 tokens."""

    seed: int = Field(
        default=0, title="Seed", description="Seed of the order of rows, of new weights and of sampled generations."
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion",
        title="Loss on",
        description="completion: the prompt's tokens carry no loss; all: language modelling.",
    )
    epochs: float = Field(
        default=2.0, gt=0, title="Epochs", description="Passes over the rows; overridden by the number of steps."
    )
    steps: int | None = Field(
        default=None, ge=1, title="Steps", description="Optimizer steps; when unset, they follow from the epochs."
    )
    batch_size: int = Field(default=128, ge=1, title="Batch", description="Sequences an optimizer step, over all processes.")
    shuffle: bool = Field(
        default=True, title="Shuffle", description="Draw rows in random order; off for a curriculum that is in order."
    )
    max_length: int = Field(
        default=4096, ge=2, title="Longest sequence", description="Tokens of prompt and completion together."
    )
    too_long: Literal["drop", "truncate"] = Field(
        default="drop",
        title="Too long",
        description="Longer sequences are dropped, or cut (then without EOS); a prompt that leaves no room is dropped.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, title="Optimizer", description="AdamW and its schedule.")
    dtype: Dtype = Field(
        default="float32",
        title="Compute type",
        description="bfloat16 multiplies matrices in it; weights, optimizer, log-probs and losses stay float32.",
    )
    heldout_rows: int = Field(
        default=256, ge=0, title="Held-out rows", description="Rows of the held-out loss, after every epoch."
    )
    generations: int = Field(
        default=32, ge=1, title="Generations", description="Prompts whose completions are sampled at the end and kept."
    )
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0.7), title="Sampling", description="How the kept generations are drawn."
    )
    runtime: Runtime = Field(
        default_factory=Runtime, title="Runtime", description="Use of the machine; not identity.", json_schema_extra=OPERATIONAL
    )


SPEC = StageSpec(
    name="sft",
    version=1,
    config=SftConfig,
    inputs={"model": Port("model"), "train": Port("dataset"), "heldout": Port("dataset", required=False)},
    outputs={"checkpoint": "model", "generations": "dataset"},
    headline=("heldout_loss",),
    distributed=True,
)
