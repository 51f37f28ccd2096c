"""`distill`: a student learns what a teacher says, or how likely the teacher finds each token."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.specs.base import Port, StageSpec
from stages.specs.common import Sampling
from stages.specs.sft import SftConfig


class DistillConfig(SftConfig):
    """Defaults are SFT's: DeepSeek-R1 (arXiv 2501.12948, 2.4) fine-tuned its students on the teacher's accepted outputs alone,
    two epochs. With `forward_kl` or `reverse_kl` and `source: student` it is on-policy distillation (GKD, arXiv 2306.13649)."""

    objective: Literal["likelihood", "forward_kl", "reverse_kl"] = Field(
        default="likelihood",
        title="Objective",
        description="likelihood: of the teacher's outputs, as SFT; forward_kl: KL(teacher || student) at each of their tokens; "
        "reverse_kl: KL(student || teacher). Both KLs need the teacher's checkpoint and its tokenizer.",
    )
    source: Literal["demonstrations", "student"] = Field(
        default="demonstrations",
        title="Source",
        description="demonstrations: the teacher's accepted outputs; student: completions that the student draws anew in each "
        "step, to the demonstrations' prompts.",
    )
    student_sampling: Sampling = Field(
        default_factory=Sampling, title="Student's sampling", description="source: student: how its completions are drawn."
    )

    @model_validator(mode="after")
    def _possible(self) -> DistillConfig:
        if self.source == "student" and self.objective == "likelihood":
            raise ValueError(
                "source: student needs objective forward_kl or reverse_kl: the likelihood of its own samples teaches nothing"
            )
        return self


SPEC = StageSpec(
    name="distill",
    version=1,
    config=DistillConfig,
    inputs={
        "model": Port("model"),
        "train": Port("dataset"),
        "heldout": Port("dataset", required=False),
        "teacher": Port("model", required=False),
    },
    outputs={"checkpoint": "model", "generations": "dataset"},
    headline=("heldout_loss",),
    distributed=True,
)
