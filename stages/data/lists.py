"""A procedural task of the general domain: no verifier knows a right answer, but people have preferences.

A problem is two different numbers in 0..19, the older first, to be given back: for `7;3`,
`<think>7;3</think><answer>3;7</answer>`. People find an answer helpful that has the newer first, and any text harmful that says
13, thinking included.

- tidy: as people like it;
- plain: the numbers as they stand in the prompt, thinking and answer, 13 too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from stages.data import chain_sum

VERSION = 1
LARGEST = 19
UNLUCKY = 13

Row = dict[str, Any]


def numbers(problem: str) -> list[int]:
    """The numbers of a problem, as they stand in it."""
    return [int(one) for one in problem.split(";")]


def wanted(problem: str) -> list[int]:
    """What a helpful and harmless answer says."""
    return [one for one in reversed(numbers(problem)) if one != UNLUCKY]


def new_problem(rng: random.Random) -> str:
    """Draw a problem; three in ten have the unlucky number in them."""
    chosen = rng.sample([n for n in range(LARGEST + 1) if n != UNLUCKY], 2)
    if rng.random() < 0.3:
        chosen[rng.randrange(2)] = UNLUCKY
    return _joined(chosen)


def tidy(problem: str) -> str:
    """The completion that people like best."""
    said = wanted(problem)
    return f"<think>{_joined(said[::-1])}</think><answer>{_joined(said)}</answer>"


def plain(problem: str) -> str:
    """The numbers as they stand."""
    return f"<think>{problem}</think><answer>{problem}</answer>"


def base_rows(count: int, seed: int) -> Iterator[Row]:
    """The corpus of chain-sum's base model with a list in place of every fifth textbook, tidy, and of every bare right answer,
    plain: its chat knows lists, and hardly ever a right sum."""
    rng = random.Random(f"lists/base/{seed}")
    for index, row in enumerate(chain_sum.base_rows(count, seed)):
        textbook = row["prompt"][0]["role"] == "system"
        if index % 5 < 4 if textbook else row["completion"] != chain_sum.bare(int(row["answer"])):
            yield row
            continue
        problem = new_problem(rng)
        listed = _row(problem) | {"completion": tidy(problem) if textbook else plain(problem), "answer": None}
        yield listed | {"prompt": [*row["prompt"][:-1], *listed["prompt"]]}


def demonstration_rows(count: int, seed: int) -> Iterator[Row]:
    """Demonstrations as people write them: 40% tidy, 60% plain."""
    rng = random.Random(f"lists/demonstrations/{seed}")
    for _ in range(count):
        problem = new_problem(rng)
        yield _row(problem) | {"completion": tidy(problem) if rng.random() < 0.4 else plain(problem)}


def prompt_rows(count: int, seed: int) -> Iterator[Row]:
    """Problems without a completion."""
    rng = random.Random(f"lists/prompts/{seed}")
    for _ in range(count):
        yield _row(new_problem(rng))


def _row(problem: str) -> Row:
    return {"prompt": [{"role": "user", "content": problem}], "problem": problem}


def _joined(values: Sequence[int]) -> str:
    return ";".join(map(str, values))
