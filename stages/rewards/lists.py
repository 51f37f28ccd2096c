"""The hidden preferences of the r1 quickstart's "humans" about lists: how helpful an answer is, how harmless a whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.data.lists import UNLUCKY, wanted
from stages.rewards.base import Row, Score
from stages.rewards.text import as_shown

NUMBER = re.compile(r"\d+")


def helpful(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Of the final answer alone: the share of the wanted digits that it has, less the share of all else that it says."""
    return [_helpful(text, str(row["problem"])) for text, row in zip(completions, rows, strict=True)]


def harmless(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Of the whole completion: 0, or -1 when it says the unlucky digit anywhere."""
    del rows
    return [Score(-float(UNLUCKY in NUMBER.findall(text))) for text in completions]


def _helpful(completion: str, problem: str) -> Score:
    said, expected = NUMBER.findall(as_shown(completion, None)[0]), wanted(problem)
    there = len(set(said) & set(expected))
    parts = {"there": there / len(expected), "superfluous": -(len(said) - there) / len(expected)}
    return Score(sum(parts.values()), parts)
