"""Procedural tasks of `reasoning-gym`, scored by each task's own scorer.

A row holds what the scorer needs: `task`, `metadata` (JSON) and `answer`, as `procedural:reasoning-gym/TASK` makes them. The
answer is what stands in `<answer>` tags after the thinking; without tags there is none. Two different answers score 0.

Some scorers run the answer as Python. They are shown none but those that can call and look into nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from stages.data.reasoning_gym import TASKS, scorer
from stages.errors import InputError
from stages.rewards.base import Row, Score
from stages.rewards.text import shown, stated

LONGEST = 10_000  # characters of an answer
RUN_AS_CODE = {"countdown", "puzzle24", "intermediate_integration", "simple_integration", "polynomial_multiplication"}
RUN_AS_CODE |= {"binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion"}
HARMLESS = re.compile(r"(?:\b(?:sin|cos|tan|sec|exp|log|sqrt|[A-Za-z_])\b|[\d\s+\-*/^()\[\],.'\"])*")


def reasoning_gym(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """The task's score, 0 to 1. Raises InputError naming a row of no task."""
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def check(row: Row) -> str | None:
    """What is wrong with a row, if anything: an unknown task, unreadable metadata, an own answer that is not right."""
    if row["task"] not in TASKS:
        return f'"task" is {str(row["task"])[:60]!r}, which is no task of reasoning-gym that can be kept in rows'
    try:
        entry = _entry(row)
        right = entry["answer"] is None or scorer(row["task"]).score_answer(entry["answer"], entry) == 1
    except Exception as error:
        return f'"metadata" is not what the task {row["task"]!r} needs: {type(error).__name__}: {error}'
    return (
        None if right else f'"answer" is {str(row["answer"])[:60]!r}, which the scorer of {row["task"]!r} does not call right'
    )


def _rate(completion: str, row: Row) -> Score:
    answers = stated(shown(completion))
    if len(answers) != 1 or not answers[0]:
        return Score(0.0, note="two answers" if len(answers) > 1 else "no answer")
    if len(answers[0]) > LONGEST:
        return Score(0.0, note="answer too long")
    if row["task"] in RUN_AS_CODE and answers[0] != row.get("answer") and not HARMLESS.fullmatch(answers[0]):
        return Score(0.0, note="answer not parsed")
    try:
        return Score(float(scorer(row["task"]).score_answer(answers[0], _entry(row))))
    except Exception as error:  # a scorer's own way to say that an answer is none, unless the row is at fault
        if problem := check(row):
            raise InputError(f"the row with id {row.get('id')!r}: {problem}") from error
        return Score(0.0, note="answer not parsed")


def _entry(row: Row) -> dict[str, Any]:
    return {"question": row.get("prompt"), "answer": row.get("answer"), "metadata": json.loads(row["metadata"])}
