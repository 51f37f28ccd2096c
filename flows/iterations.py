"""GRPO's outer loop (objectives-and-loops 3.4.1): every iteration is a step, and its checkpoint the next one's policy and
reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from stages.specs.base import Config
from stages.specs.grpo import GrpoConfig
from tasks.pipeline import Pipeline, Source

C = TypeVar("C", bound=Config)


def iteration(
    pipeline: Pipeline, name: str, config: GrpoConfig, number: int, policy: Source, inputs: Mapping[str, Source]
) -> Source:
    """The checkpoint of the iteration of a number, from 1: the step NAME, NAME-2 and so on."""
    step = name if number == 1 else f"{name}-{number}"
    return pipeline.step(step, "grpo", again(config, number), policy=policy, **inputs)["checkpoint"]


def again(config: C, number: int) -> C:
    """A step's config for its repetition of a number, from 1: each has a seed of its own, so that it draws anew."""
    seeded: Any = config
    return config.model_copy(update={"seed": seeded.seed + number - 1})
