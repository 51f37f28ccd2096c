"""A reward by length alone: a penalty to mix with others, or a baseline that tells whether a judge merely counts words."""

from __future__ import annotations

from collections.abc import Sequence

from stages.rewards.base import Row, Score


def length(completions: Sequence[str], rows: Sequence[Row], weight: float = -0.001) -> list[Score | None]:
    """`weight` for each character of the completion."""
    del rows
    return [Score(weight * len(text)) for text in completions]
