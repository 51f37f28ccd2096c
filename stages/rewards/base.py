"""What a reward is: completions and their rows in, one Score or None a completion out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.specs.base import Config

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A completion's reward. `step_ends` are inclusive character positions of the steps that `step_scores` rate."""

    total: float
    components: Mapping[str, float] = field(default_factory=dict)
    step_scores: Sequence[float] | None = None
    step_ends: Sequence[int] | None = None


@dataclass(frozen=True)
class RewardEntry:
    """Where a reward's function is, its version (raised when its values change), the columns its rows must have. A learned
    reward reads a model, which the stage is given as the input `port`. One whose arguments are checked names their Config."""

    target: str
    version: int
    columns: tuple[str, ...] = ()
    port: str | None = None
    arguments: str | None = None

    def parse(self, args: Mapping[str, Any]) -> Config | None:
        """The arguments as a Config, when the reward has one. Raises pydantic's ValidationError."""
        if self.arguments is None:
            return None
        module, name = self.arguments.split(":")
        return getattr(importlib.import_module(module), name).model_validate(dict(args))
