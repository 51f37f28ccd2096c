"""A verifier: is the final answer, inside `<answer>` tags, the row's `answer`?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.rewards.base import Row, Score

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(completion: str) -> str | None:
    """The text of the last complete `<answer>` element, without outer spaces; None when there is none."""
    found = ANSWER.findall(completion)
    return found[-1].strip() if found else None


def answer(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the final answer equals the row's `answer` as text, else 0."""
    return [Score(float(final_answer(text) == str(row["answer"]).strip())) for text, row in zip(completions, rows, strict=True)]
