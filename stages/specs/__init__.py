"""The stages by name, as the orchestrating side sees them: no torch here."""

from stages.specs import evaluate, grpo, label, ppo, prepare, reward_model, sample, sft
from stages.specs.base import Config, Port, StageSpec

STAGES: dict[str, StageSpec] = {
    module.SPEC.name: module.SPEC for module in (prepare, sft, sample, label, reward_model, ppo, grpo, evaluate)
}

__all__ = ["STAGES", "Config", "Port", "StageSpec"]
