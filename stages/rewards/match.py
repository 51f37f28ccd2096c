"""Verifiers by text: is the answer one of those that the row's `answer` accepts (a text, or a list of them)?

The answer is what stands in `<answer>` tags after the thinking, or without tags all that is shown. Two different answers are
wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from stages.rewards.base import Row, Score
from stages.rewards.text import shown, stated

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Punctuation that is part of a number: 3.14, 1/2, 10:30, 2,5 (a comma before three digits parts thousands), -5, .5, 50%.
NUMERIC = re.compile(r"(?<=\d)(?!\s|,\d{3}(?!\d))\W(?=\d)|(?<!\w)(?:-(?=\.?\d)|\.(?=\d))|(?<=\d)%")


def exact(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the answer is an accepted one, to the letter but for outer spaces, else 0."""
    return [_rate(text, row, str.strip) for text, row in zip(completions, rows, strict=True)]


def normalised(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the answer is an accepted one after `normal`, else 0."""
    return [_rate(text, row, normal) for text, row in zip(completions, rows, strict=True)]


def normal(text: str) -> str:
    """SQuAD's normal form, for any script: NFKC, case folded, no punctuation or invisible characters, no English articles, one
    space between words. Unlike SQuAD's, it leaves numbers whole: their sign, point, slash and % stay, and only the commas that
    part thousands go. Other signs, such as +, stay; so does text that is nothing but what is left out."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = "".join("-" if unicodedata.category(one) == "Pd" or one == "\u2212" else one for one in folded)
    plain = "".join(one for one in plain if unicodedata.category(one) != "Cf")
    numeric = {found.start() for found in NUMERIC.finditer(plain)}
    kept = (one for place, one in enumerate(plain) if place in numeric or unicodedata.category(one)[0] != "P")
    return " ".join(ARTICLES.sub(" ", "".join(kept)).split()) or " ".join(folded.split())


def _rate(completion: str, row: Row, form: Callable[[str], str]) -> Score:
    text = shown(completion)
    answers = stated(text) or [text]
    if len(answers) > 1:
        return Score(0.0, note="two answers")
    if not answers[0]:
        return Score(0.0, note="no answer")
    accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return Score(float(form(answers[0]) in {form(str(one)) for one in accepted}))
