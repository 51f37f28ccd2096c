"""A procedural task of the general domain: no verifier knows a right answer, but people have preferences.

A problem is three different digits, to be given back: for `7;3;9`, `<think>7;3;9</think><answer>7;3;9</answer>`. People find an
answer helpful that leaves none out, and any text harmful that says 4, thinking included.

- whole: as people like it;
- sloppy: one digit is left out of the answer, and 4 is said like any other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from stages.data import chain_sum

VERSION = 2
UNLUCKY = "4"

Row = dict[str, Any]


def numbers(problem: str) -> list[str]:
    """The digits of a problem."""
    return problem.split(";")


def wanted(problem: str) -> list[str]:
    """What a helpful and harmless answer says."""
    return [one for one in numbers(problem) if one != UNLUCKY]


def new_problem(rng: random.Random) -> str:
    """Draw a problem; three in ten have the unlucky one in them."""
    chosen = rng.sample([digit for digit in "0123456789" if digit != UNLUCKY], 3)
    if rng.random() < 0.3:
        chosen[rng.randrange(3)] = UNLUCKY
    return ";".join(chosen)


def whole(problem: str) -> str:
    """The completion that people like best."""
    return _completion(wanted(problem), wanted(problem))


def sloppy(problem: str, rng: random.Random) -> str:
    """An answer that leaves a digit out."""
    said = numbers(problem)
    left = rng.randrange(3)
    return _completion(said, said[:left] + said[left + 1 :])


def unthinking(problem: str, rng: random.Random) -> str:
    """A sloppy answer alone."""
    return sloppy(problem, rng).partition("</think>")[2]


def base_rows(count: int, seed: int) -> Iterator[Row]:
    """The corpus of chain-sum's base model with a list in place of every third textbook, whole, and of every bare right answer
    and every other good one, unthinking: its chat knows lists, and hardly ever a right sum."""
    rng = random.Random(f"lists/base/{seed}")
    for index, row in enumerate(chain_sum.base_rows(count, seed)):
        textbook = row["prompt"][0]["role"] == "system"
        taken = {chain_sum.bare(int(row["answer"])), chain_sum.worked(row["problem"]) if index % 2 else None}
        if index % 3 < 2 if textbook else row["completion"] not in taken:
            yield row
            continue
        problem = new_problem(rng)
        listed = _row(problem) | {"completion": whole(problem) if textbook else unthinking(problem, rng), "answer": None}
        yield listed | {"prompt": [*row["prompt"][:-1], *listed["prompt"]]}


def demonstration_rows(count: int, seed: int) -> Iterator[Row]:
    """Demonstrations as people write them: 40% whole, 60% sloppy."""
    rng = random.Random(f"lists/demonstrations/{seed}")
    for _ in range(count):
        problem = new_problem(rng)
        yield _row(problem) | {"completion": whole(problem) if rng.random() < 0.4 else sloppy(problem, rng)}


def prompt_rows(count: int, seed: int) -> Iterator[Row]:
    """Problems without a completion."""
    rng = random.Random(f"lists/prompts/{seed}")
    for _ in range(count):
        yield _row(new_problem(rng))


def _row(problem: str) -> Row:
    return {"prompt": [{"role": "user", "content": problem}], "problem": problem}


def _completion(thought: Sequence[str], said: Sequence[str]) -> str:
    return f"<think>{';'.join(thought)}</think><answer>{';'.join(said)}</answer>"
