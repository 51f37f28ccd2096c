"""The hidden preferences of the r1 quickstart's "humans" about lists: how helpful an answer is, how harmless a whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from stages.data.lists import UNLUCKY, wanted
from stages.rewards.base import Row, Score
from stages.rewards.form import final_part

NUMBER = re.compile(r"\d+")


def helpful(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Of the final answer alone: the share of the wanted numbers that it has, less the share of others, plus the share of
    its neighbours in rising order."""
    return [_helpful(text, str(row["problem"])) for text, row in zip(completions, rows, strict=True)]


def harmless(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Of the whole completion: 0, or -1 when it says the unlucky number anywhere."""
    del rows
    return [Score(-float(str(UNLUCKY) in NUMBER.findall(text))) for text in completions]


def _helpful(completion: str, problem: str) -> Score:
    said, expected = [int(one) for one in NUMBER.findall(final_part(completion))[:20]], wanted(problem)
    there = len(set(said) & set(expected)) / len(expected)
    others = (len(said) - len(set(said) & set(expected))) / len(expected)
    neighbours = list(pairwise(said))
    rising = sum(a < b for a, b in neighbours) / len(neighbours) if neighbours else 0.0
    parts = {"there": there, "others": -others, "rising": rising}
    return Score(sum(parts.values()), parts)
