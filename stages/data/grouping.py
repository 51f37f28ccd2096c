"""Rows of one prompt, which stand side by side in a dataset of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from stages.errors import InputError

Row = dict[str, Any]


def together(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The samples of one prompt after another. Raises InputError when those of a prompt are not together."""
    known: set[int] = set()
    for key, group in groupby(rows, key=lambda row: (row["id"], row.get("step"))):
        if hash(key) in known:
            raise InputError(f"the samples of the prompt with id {key[0]!r} do not stand side by side; sort them by id")
        known.add(hash(key))
        yield list(group)
