"""The hidden preference of the quickstart's "human": rates the written steps of a running sum, never a lucky guess."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.data.chain_sum import steps
from stages.rewards.answer import final_answer
from stages.rewards.base import Row, Score

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def preference(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Share of right steps, less half the share of wrong or superfluous ones, plus one half when all of it is right.

    A completion without steps scores 0 whether or not its answer is right: crediting lucky guesses makes a preference that
    a small reward model cannot learn.
    """
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def _rate(completion: str, row: Row) -> Score:
    expected = steps(str(row["problem"]))
    thinking = THINK.search(completion)
    written = thinking.group(1).split(";") if thinking and thinking.group(1).strip() else []
    right = sum(a == b for a, b in zip(written, expected, strict=False))
    wrong = len(written) - right
    complete = written == expected and final_answer(completion) == str(row["answer"])
    parts = {"right": right / len(expected), "wrong": -0.5 * wrong / len(expected), "complete": 0.5 * complete}
    return Score(sum(parts.values()), parts)
