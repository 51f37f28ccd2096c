"""Procedural sources by name. To add one: write `rows(count, seed)` and add one line here.

`procedural:NAME` in a recipe names one; its digest is of the name and the version, its rows and seed are `prepare`'s.
`procedural:reasoning-gym/TASK` is each task of `reasoning-gym`, in its default difficulty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.data import chain_sum, lists
from stages.errors import InputError

Row = dict[str, Any]
GYM = "reasoning-gym/"


@dataclass(frozen=True)
class Source:
    """Rows by count and seed; `version` is raised when they change."""

    rows: Callable[[int, int], Iterator[Row]]
    version: int | str


PROCEDURAL: dict[str, Source] = {
    "chain-sum/base": Source(chain_sum.base_rows, chain_sum.VERSION),
    "chain-sum/demonstrations": Source(chain_sum.demonstration_rows, chain_sum.VERSION),
    "chain-sum/prompts": Source(chain_sum.prompt_rows, chain_sum.VERSION),
    "lists/base": Source(lists.base_rows, lists.VERSION),
    "lists/demonstrations": Source(lists.demonstration_rows, lists.VERSION),
    "lists/prompts": Source(lists.prompt_rows, lists.VERSION),
}


def procedural(name: str) -> Source:
    """The source of a name. Raises KeyError, with the names there are as its argument, for one that is not."""
    known = list(PROCEDURAL)
    if name.startswith(GYM):
        try:
            from stages.data import reasoning_gym
        except ModuleNotFoundError as error:
            raise InputError(f"procedural:{name} needs a package that is not installed: pip install reasoning-gym") from error
        task = name.removeprefix(GYM)
        if task in reasoning_gym.TASKS:
            return Source(partial(reasoning_gym.rows, task), reasoning_gym.VERSION)
        known = [GYM + one for one in reasoning_gym.TASKS]
    if name not in PROCEDURAL:
        raise KeyError(known)
    return PROCEDURAL[name]
