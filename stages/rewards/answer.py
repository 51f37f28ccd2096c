"""A verifier: is the final answer, inside `<answer>` tags, the row's `answer`?"""

from __future__ import annotations

from collections.abc import Sequence

from stages.rewards.base import Row, Score


def final_answer(completion: str) -> str | None:
    """The text of the last complete `<answer>` element, without outer spaces; None when there is none."""
    # Not by a regular expression: it would look for the end of each of a thousand `<answer>` that never close.
    closed = completion.split("</answer>")[:-1]
    return next((text.partition("<answer>")[2].strip() for text in reversed(closed) if "<answer>" in text), None)


def answer(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the final answer equals the row's `answer` as text, else 0."""
    return [Score(float(final_answer(text) == str(row["answer"]).strip())) for text, row in zip(completions, rows, strict=True)]
