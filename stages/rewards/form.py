"""The form of an answer that reasons: `<think>...</think><answer>...</answer>`, each tag once, in this order (rl4llm 6.6.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.rewards.base import Row, Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LAST = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
THINK = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
WHOLE = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)


def form(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when a completion is nothing but thinking and an answer, neither of them blank, with every tag once; else 0."""
    del rows
    return [Score(float(well_formed(text))) for text in completions]


def well_formed(completion: str) -> bool:
    """Whether a completion has the form."""
    found = WHOLE.fullmatch(completion)
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return bool(found and once and found[1].strip() and found[2].strip())


def final_part(completion: str) -> str:
    """What a reader is shown: the last answer without its tags or, where there are none, what follows the thinking."""
    if found := LAST.findall(completion):
        return found[-1].strip()
    _, closed, after = completion.rpartition("</think>")
    return "" if "<think>" in completion and not closed else after.strip()


def as_shown(completion: str, finish: str | None) -> tuple[str, str | None]:
    """What a reader is shown, and how it ended: what was cut off after its answer was complete ended there."""
    return final_part(completion), "stop" if completion.rstrip().endswith("</answer>") else finish


def thinking(completion: str) -> str:
    """The text between the first pair of thinking tags; all that follows the first one when it is not closed."""
    found = THINK.search(completion)
    return found[1] if found else ""
