"""The form of an answer that reasons: `<think>...</think><answer>...</answer>`, each tag once, in this order (rl4llm 6.6.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.rewards.base import Row, Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WHOLE = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)


def form(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when a completion is nothing but thinking and an answer, neither of them blank, with every tag once; else 0."""
    del rows
    return [Score(float(well_formed(text))) for text in completions]


def well_formed(completion: str) -> bool:
    """Whether a completion has the form."""
    # First, because with a tag that comes many times the pattern would try every pair of them.
    if any(completion.count(tag) != 1 for tag in TAGS):
        return False
    found = WHOLE.fullmatch(completion)
    return bool(found and found[1].strip() and found[2].strip())
