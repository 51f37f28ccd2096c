"""The hidden preference of the quickstart's "human": rates the written steps of a running sum, never a lucky guess."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.data.chain_sum import steps
from stages.rewards.answer import final_answer
from stages.rewards.base import Row, Score

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def preference(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Share of right steps, plus one half when all of it is right, less half a share for each superfluous step.

    A completion without steps scores 0 whether or not its answer is right, and a wrong step no less: crediting lucky guesses,
    or rating an honest mistake below a guess, makes a preference that a small reward model cannot learn.
    """
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def _rate(completion: str, row: Row) -> Score:
    expected = steps(str(row["problem"]))
    thinking = THINK.search(completion)
    written = thinking.group(1).split(";") if thinking and thinking.group(1).strip() else []
    right = sum(a == b for a, b in zip(written, expected, strict=False))
    superfluous = max(0, len(written) - len(expected))
    complete = written == expected and final_answer(completion) == str(row["answer"])
    parts = {
        "right": right / len(expected),
        "superfluous": -0.5 * superfluous / len(expected),
        "complete": 0.5 * complete,
    }
    return Score(sum(parts.values()), parts)
