"""The hidden preference of the quickstart's "human": rates the written steps of a running sum, never a lucky guess."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, zip_longest

from stages.data.chain_sum import steps
from stages.rewards.answer import final_answer
from stages.rewards.base import Row, Score


def preference(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Share of right steps, plus one half when all of it is right, less half a share for each superfluous step.

    A completion without steps scores 0 whether or not its answer is right, and a wrong step no less: crediting lucky guesses,
    or rating an honest mistake below a guess, makes a preference that a small reward model cannot learn.

    Each written step is rated too, 1 right or 0 wrong, up to and with the `;` or `</think>` behind it, and then the answer, the
    last step. As in Math-Shepherd (arXiv 2312.08935) a step is right if it leads to the right answer, and a sum has one way
    there: a step is right if it is the one that is due in its place, from the sum that it should continue from. So a step that
    carries a wrong sum on is wrong too, however well it adds up, and one that takes up the right sum again is right. The answer
    is right if all steps are and it is; one that is missing makes the last step wrong.
    """
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def written_steps(completion: str) -> list[str]:
    """The steps between the first `<think>` and the `</think>` that follows it; none when they are missing or blank."""
    thinking, closed, _ = completion.partition("<think>")[2].partition("</think>")
    return thinking.split(";") if closed and thinking.strip() else []


def written_ends(completion: str) -> list[int]:
    """The last characters of what closes each of them."""
    start = completion.find("<think>") + len("<think>")
    closed = list(accumulate((len(step) + 1 for step in written_steps(completion)), initial=start))[1:]
    return [end - 1 for end in closed[:-1]] + [end - 2 + len("</think>") for end in closed[-1:]]


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
    ends, last = written_ends(completion), max(0, len(completion) - 1)
    rated = [float(a == b) for a, b in zip_longest(written, expected[: len(written)])]
    if not written or completion[ends[-1] + 1 :].strip():
        ends, rated = [*ends, last], [*rated, float(complete)]
    else:
        ends[-1], rated[-1] = last, 0.0
    return Score(sum(parts.values()), parts, rated, ends)
