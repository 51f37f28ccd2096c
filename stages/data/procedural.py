"""Procedural sources by name. To add one: write `rows(count, seed)` and add one line here.

`procedural:NAME` in a recipe names one; its digest is of the name and the version, its rows and seed are `prepare`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stages.data import chain_sum, lists


@dataclass(frozen=True)
class Source:
    """Rows by count and seed; `version` is raised when they change."""

    rows: Callable[[int, int], Iterator[dict[str, Any]]]
    version: int


PROCEDURAL: dict[str, Source] = {
    "chain-sum/base": Source(chain_sum.base_rows, chain_sum.VERSION),
    "chain-sum/demonstrations": Source(chain_sum.demonstration_rows, chain_sum.VERSION),
    "chain-sum/prompts": Source(chain_sum.prompt_rows, chain_sum.VERSION),
    "lists/base": Source(lists.base_rows, lists.VERSION),
    "lists/demonstrations": Source(lists.demonstration_rows, lists.VERSION),
    "lists/prompts": Source(lists.prompt_rows, lists.VERSION),
}
