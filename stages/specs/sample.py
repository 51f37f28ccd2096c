"""`sample`: completions of prompts from any policy."""

from __future__ import annotations

from pydantic import Field

from stages.specs.base import OPERATIONAL, Config, Port, Runtime, StageSpec
from stages.specs.common import Dtype, Sampling


class SampleConfig(Config):
    """Temperature 1 with nothing cut off draws from the policy itself; people compared 4 to 9 completions (InstructGPT)."""

    seed: int = Field(default=0, title="Seed", description="Seed of the samples; each has its own, derived from it.")
    prompts: int | None = Field(
        default=None, ge=1, title="Prompts", description="Use the first so many prompts; all when unset."
    )
    samples: int = Field(default=4, ge=1, title="Samples", description="Completions a prompt.")
    sampling: Sampling = Field(default_factory=Sampling, title="Sampling", description="How completions are drawn.")
    dtype: Dtype = Field(
        default="float32", title="Weights' type", description="Type the policy is loaded in; log-probs are float32 always."
    )
    runtime: Runtime = Field(
        default_factory=lambda: Runtime(save_every=10),
        title="Runtime",
        description="Use of the machine; not identity.",
        json_schema_extra=OPERATIONAL,
    )


SPEC = StageSpec(
    name="sample",
    version=1,
    config=SampleConfig,
    inputs={"policy": Port("model"), "prompts": Port("dataset")},
    outputs={"samples": "dataset"},
    headline=("samples", "length", "truncated"),
    distributed=True,
)
