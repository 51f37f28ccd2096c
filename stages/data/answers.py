"""What people answered, read and judged row by row: lines of JSON with `question`, `annotator`, `choice`, and by will `seconds`
(how long the question was looked at) and `at` (when it was answered, in ISO 8601)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.data.sources import read_files
from stages.errors import InputError

Row = dict[str, Any]
SKIP = "skip"
CHOICES = ("left", "right", "tie", SKIP)
NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Answer:
    """The last answer of an annotator to a question."""

    question: str
    annotator: str
    choice: str
    seconds: float | None


def read_answers(folder: Path, questions: Collection[str]) -> tuple[list[Answer], int]:
    """The answers, and the number of those that a later one of the same annotator to the same question replaces.

    Which is later is told by `at`, and where that is equal or missing by the order of files and rows. Raises InputError
    naming file and row for an answer that is none, or none to these questions, and when there is no answer.
    """
    last: dict[tuple[str, str], tuple[datetime, Answer]] = {}
    read = 0
    for where, row in read_files(folder):
        read += 1
        answer, when = _answer(row, where, questions), _when(row, where)
        key = (answer.annotator, answer.question)
        if key not in last or last[key][0] <= when:
            last[key] = (when, answer)
    if not last:
        raise InputError("the files of answers hold no answer: press Download on the page when questions are answered")
    return [answer for _, answer in last.values()], read - len(last)


def _answer(row: Row, where: str, questions: Collection[str]) -> Answer:
    missing = [name for name in ("question", "annotator", "choice") if row.get(name) is None]
    if missing:
        raise InputError(f'{where}: an answer has "question", "annotator" and "choice", this one has no "{missing[0]}"')
    question, annotator, choice, seconds = row["question"], row["annotator"], row["choice"], row.get("seconds")
    if not isinstance(annotator, str) or not annotator.strip():
        raise InputError(f'{where}: "annotator" must be a name, it is {annotator!r}')
    if choice not in CHOICES:
        raise InputError(f'{where}: "choice" must be one of {", ".join(CHOICES)}, it is {repr(choice)[:60]}')
    if not isinstance(question, str):
        raise InputError(f'{where}: "question" must be the id of a question, it is {repr(question)[:60]}')
    if question not in questions:
        raise InputError(
            f"{where}: none of the {len(questions)} questions has the id {repr(question)[:60]}: these are answers of another "
            "page; give as `questions` the dataset whose page.html was answered, or leave this file out"
        )
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf
    ):
        raise InputError(f'{where}: "seconds" must be a number from 0 up, it is {repr(seconds)[:60]}')
    return Answer(question, annotator.strip(), choice, None if seconds is None else float(seconds))


def _when(row: Row, where: str) -> datetime:
    at = row.get("at")
    if at is None:
        return NEVER
    try:
        when = datetime.fromisoformat(at)
    except (TypeError, ValueError):
        raise InputError(f'{where}: "at" must be a time such as 2026-01-31T12:00:00Z, it is {repr(at)[:60]}') from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
