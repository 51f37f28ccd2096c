"""GRPO's outer loop (objectives-and-loops 3.4.1): every iteration is a step, and its checkpoint the next one's policy and
reference."""

from __future__ import annotations

from collections.abc import Mapping

from stages.specs.grpo import GrpoConfig
from tasks.pipeline import Pipeline, Source


def iterate(
    pipeline: Pipeline, name: str, config: GrpoConfig, iterations: int, policy: Source, inputs: Mapping[str, Source]
) -> Source:
    """The last iteration's checkpoint. The steps are called NAME, NAME-2 and so on; each has a seed of its own, so that it
    draws other samples."""
    for iteration in range(iterations):
        step = name if iteration == 0 else f"{name}-{iteration + 1}"
        again = config.model_copy(update={"seed": config.seed + iteration})
        policy = pipeline.step(step, "grpo", again, policy=policy, **inputs)["checkpoint"]
    return policy
