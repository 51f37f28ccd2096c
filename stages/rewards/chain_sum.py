"""The hidden preference of the quickstart's "human": rates the written steps of a running sum, never a lucky guess."""

from __future__ import annotations

from collections.abc import Sequence

from stages.data.chain_sum import steps
from stages.rewards.answer import final_answer
from stages.rewards.base import Row, Score


def preference(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Share of right steps, plus one half when all of it is right, less half a share for each superfluous step.

    A completion without steps scores 0 whether or not its answer is right, and a wrong step no less: crediting lucky guesses,
    or rating an honest mistake below a guess, makes a preference that a small reward model cannot learn.
    """
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def written_steps(completion: str) -> list[str]:
    """The steps between the first `<think>` and the `</think>` that follows it; none when they are missing or blank."""
    thinking, closed, _ = completion.partition("<think>")[2].partition("</think>")
    return thinking.split(";") if closed and thinking.strip() else []


def _rate(completion: str, row: Row) -> Score:
    expected = steps(str(row["problem"]))
    written = written_steps(completion)
    right = sum(a == b for a, b in zip(written, expected, strict=False))
    superfluous = max(0, len(written) - len(expected))
    complete = written == expected and final_answer(completion) == str(row["answer"])
    parts = {
        "right": right / len(expected),
        "superfluous": -0.5 * superfluous / len(expected),
        "complete": 0.5 * complete,
    }
    return Score(sum(parts.values()), parts)
