r"""A verifier of multiple choice: is the letter that was chosen the row's `answer`?

The choice is read in `<answer>` tags after the thinking; without tags in the last `\boxed{}`; without that in phrases such as
"the answer is B", or in all that is shown. Read as B: `B`, `b`, `(B)`, `B.`, `**B**`, `B) Paris`, `B - Paris`, `Answer: B`,
`Option b`. Two different letters ("B or C") are wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from stages.errors import InputError
from stages.rewards.base import Row, Score
from stages.rewards.text import last_box, shown, stated

MARKUP = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:bf|it|rm|sf)|boxed)\b|[*_`${}]")
LETTER = r"\(?([a-z])(?![\w'\u2019])"
SAID = re.compile(
    rf"\b(?:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*(?:(?:option|choice)\s+)?(?!(?-i:a)\s+\w){LETTER}", re.IGNORECASE
)
LABEL = re.compile(rf"\W*{LETTER}(?:[).:\]]|\W*$|\s+[-\u2013\u2014]\s|\s*(?:,|&|/|\bor\b|\band\b))", re.IGNORECASE)
FURTHER = re.compile(rf"(?:\bor\b|\band\b|[,;/&(\n])\s*{LETTER}(?=\W*$|[).:\]]|\s*(?:,|&|/|\bor\b|\band\b))", re.IGNORECASE)


def choice(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the letter is the row's, else 0. Raises InputError naming a row whose answer is no letter."""
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def check(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    return None if len(letters(str(row["answer"]))) == 1 else f'"answer" is {str(row["answer"])[:60]!r}, which is no one letter'


def letters(text: str) -> set[str]:
    """The letters that a text chooses, capital: that of its label and its alternatives, else those that it says it chooses."""
    text = MARKUP.sub("", unicodedata.normalize("NFKC", text))
    label = LABEL.match(text)
    found = [label[1], *FURTHER.findall(text, label.end(1))] if label else SAID.findall(text)
    if found and not label:
        found += FURTHER.findall(text, SAID.search(text).end(1))  # pyright: ignore[reportOptionalMemberAccess]
    return {letter.upper() for letter in found}


def _rate(completion: str, row: Row) -> Score:
    if problem := check(row):
        raise InputError(f"the row with id {row.get('id')!r}: {problem}")
    text = shown(completion)
    answers = stated(text)
    box = last_box(text)
    chosen = set[str]().union(*map(letters, answers)) if answers else letters(text if box is None else box)
    if len(chosen) > 1:
        return Score(0.0, note="two answers")
    if not chosen:
        return Score(0.0, note="answer not parsed" if text else "no answer")
    return Score(float(chosen == letters(str(row["answer"]))))
