"""The parts of a completion: what it thinks, what it shows, what it states as its answer, its words."""

from __future__ import annotations

import re

CLOSED, OPENED = "</think>", "<think>"
# Signs of languages that are written without spaces: each counts as a word.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
ANSWER = re.compile(r"<answer>(.*?)(</answer>|\Z)", re.DOTALL)
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


def thinking(completion: str) -> str | None:
    """What stands before the last `</think>`, or after a `<think>` that is never closed; None when there is neither tag."""
    before, closed, _ = completion.rpartition(CLOSED)
    if closed:
        return before.strip().removeprefix(OPENED)
    return completion.partition(OPENED)[2] if OPENED in completion else None


def shown(completion: str) -> str:
    """What a reader is shown: what follows the thinking. Nothing, when that never ends."""
    _, closed, after = completion.rpartition(CLOSED)
    return "" if OPENED in completion and not closed else after.partition(OPENED)[0].strip()


def as_shown(completion: str, finish: str | None) -> tuple[str, str | None]:
    """The final answer as a reader is shown it: the last one in tags without these, or else all that follows the thinking; and
    how it ended: a complete answer has ended, whatever was cut off after it."""
    after = completion.rpartition(CLOSED)[2]
    if OPENED in after.partition("<answer>")[0]:  # still thinking
        return "", finish
    if found := ANSWER.findall(after):
        text, closed = found[-1]
        return text.strip(), "stop" if closed else finish
    return after.strip(), finish


def stated(shown: str) -> list[str]:
    """The different texts inside `<answer>` tags, in order; of nested tags the innermost."""
    found = [part.rpartition("<answer>") for part in shown.split("</answer>")[:-1]]
    return list(dict.fromkeys(text.strip() for _, opened, text in found if opened))


def last_box(shown: str) -> str | None:
    r"""What is inside the last `\boxed{}` whose braces are balanced; None when there is none."""
    _, boxed, rest = shown.rpartition(r"\boxed{")
    depth = 1
    for place, character in enumerate(rest if boxed else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
    return None


def words(text: str) -> list[str]:
    """Lower-case words, as spaces part them; each sign of a language written without spaces is one."""
    return WORD.findall(text.lower())
