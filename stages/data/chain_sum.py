"""A procedural task whose reasoning is visible and checkable: running sums.

A problem is a start and 2 to 5 signed one-digit terms whose running total stays in 0..19; a worked solution writes every
partial sum: `12+3-9` -> `<think>12+3=15;15-9=6</think><answer>6</answer>`.

Four kinds of text are made of it:

- textbook: the worked solution, under a system message `textbook` (what a base model saw in its pre-training);
- good: the worked solution, as chat;
- sloppy: as good, but with one wrong sum, carried on to the answer;
- guess: an answer between 0 and 19 at random, without steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

VERSION = 1
LARGEST = 19
TERM = re.compile(r"[+-]?\d+")
TOKEN_PATTERN = r"<[^<>]*>|[+-]\d|\d+|[A-Za-z]+|\s+|[^\sA-Za-z\d]"

Row = dict[str, Any]


def words() -> list[str]:
    """Every word of the task, in a fixed order: the vocabulary of a tokenizer for it."""
    numbers = [str(n) for n in range(100)]
    signed = [f"{sign}{n}" for sign in "+-" for n in range(10)]
    return [*numbers, *signed, "=", ";", "<think>", "</think>", "<answer>", "</answer>", "textbook"]


def steps(problem: str) -> list[str]:
    """The partial sums of a problem: `12+3-9` -> `["12+3=15", "15-9=6"]`."""
    first, *terms = TERM.findall(problem)
    total, lines = int(first), []
    for term in terms:
        lines.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    return lines


def result(problem: str) -> int:
    """The value of a problem."""
    return sum(int(term) for term in TERM.findall(problem))


def new_problem(rng: random.Random) -> str:
    """Draw a problem."""
    total = rng.randint(0, LARGEST)
    text = str(total)
    for _ in range(rng.randint(2, 5)):
        term = rng.choice([t for t in range(-9, 10) if t != 0 and 0 <= total + t <= LARGEST])
        text += f"{term:+d}"
        total += term
    return text


def worked(problem: str) -> str:
    """The worked solution."""
    return f"<think>{';'.join(steps(problem))}</think><answer>{result(problem)}</answer>"


def sloppy(problem: str, rng: random.Random) -> str:
    """A worked solution with one wrong sum; what follows builds on it."""
    first, *terms = TERM.findall(problem)
    total, lines, slip = int(first), [], rng.randrange(len(terms))
    for index, term in enumerate(terms):
        after = total + int(term)
        if index == slip:
            after = max(0, after + rng.choice([-2, -1, 1, 2]))
            after += after == total + int(term)
        lines.append(f"{total}{term}={after}")
        total = after
    return f"<think>{';'.join(lines)}</think><answer>{total}</answer>"


def bare(value: int) -> str:
    """An answer without steps."""
    return f"<answer>{value}</answer>"


def guess(rng: random.Random) -> str:
    """An answer at random, without steps."""
    return bare(rng.randint(0, LARGEST))


def _row(problem: str, completion: str | None, textbook: bool = False) -> Row:
    messages = [{"role": "user", "content": problem}]
    if textbook:
        messages.insert(0, {"role": "system", "content": "textbook"})
    row: Row = {"prompt": messages, "problem": problem, "answer": str(result(problem))}
    return row if completion is None else row | {"completion": completion}


def base_rows(count: int, seed: int) -> Iterator[Row]:
    """A base model's corpus in order: 70% textbook, then a web-like mixture in which chat is mostly guesses.

    The mixture is 35% textbook, 15% bare right answers, 32% guesses, 8% sloppy, 10% good: the model can reason, but answers
    chat by guessing, so that what follows elicits a skill it has.
    """
    rng = random.Random(f"chain-sum/base/{seed}")
    for index in range(count):
        problem = new_problem(rng)
        draw = rng.random() if index >= 0.7 * count else 0.0
        if draw < 0.35:
            yield _row(problem, worked(problem), textbook=True)
        elif draw < 0.50:
            yield _row(problem, bare(result(problem)))
        elif draw < 0.82:
            yield _row(problem, guess(rng))
        elif draw < 0.90:
            yield _row(problem, sloppy(problem, rng))
        else:
            yield _row(problem, worked(problem))


def demonstration_rows(count: int, seed: int) -> Iterator[Row]:
    """Demonstrations of mixed quality, as people write them: 50% good, 30% guesses, 20% sloppy."""
    rng = random.Random(f"chain-sum/demonstrations/{seed}")
    for _ in range(count):
        problem, draw = new_problem(rng), rng.random()
        yield _row(problem, worked(problem) if draw < 0.5 else guess(rng) if draw < 0.8 else sloppy(problem, rng))


def prompt_rows(count: int, seed: int) -> Iterator[Row]:
    """Problems with their answers, and no completion."""
    rng = random.Random(f"chain-sum/prompts/{seed}")
    for _ in range(count):
        yield _row(new_problem(rng), None)
