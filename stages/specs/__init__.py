"""The stages by name, as the orchestrating side sees them: no torch here."""

from stages.specs import (
    answers,
    distill,
    evaluate,
    grpo,
    label,
    log_probs,
    ppo,
    preference,
    prepare,
    questions,
    rejection,
    reward_model,
    sample,
    sft,
)
from stages.specs.base import Config, Port, StageSpec

STAGES: dict[str, StageSpec] = {
    module.SPEC.name: module.SPEC
    for module in (
        *(prepare, sft, sample, label, questions, answers, rejection, reward_model),
        *(ppo, grpo, log_probs, preference, distill, evaluate),
    )
}

__all__ = ["STAGES", "Config", "Port", "StageSpec"]
