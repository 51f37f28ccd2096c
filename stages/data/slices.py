"""An endless stream of prompts: one seeded permutation of all of them after another, from which slices are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Set

from stages.errors import InputError
from stages.specs.prepare import Slice


def taken(prompts: Set[str], cut: Slice) -> list[str]:
    """The prompts in a slice, in the stream's order. Whoever takes slices end to end meets each prompt once in every pass.

    A slice over the end of a pass may meet a prompt in both: it is then given once, and this slice is so much shorter. The
    order depends on the prompts themselves, not on a file. Raises InputError for a slice of more prompts than there are.
    """
    if cut.count > len(prompts):
        raise InputError(
            f"slice.count asks for {cut.count} prompts and there are {len(prompts)} for training: take at most so many, or "
            "prepare more"
        )
    found: dict[str, None] = {}
    position, end = cut.start, cut.start + cut.count
    while position < end:
        number, place = divmod(position, len(prompts))
        part = permutation(prompts, cut.seed, number)[place : place + end - position]
        found |= dict.fromkeys(part)
        position += len(part)
    return list(found)


def permutation(prompts: Set[str], seed: int, number: int) -> list[str]:
    """The order of all prompts in the pass of a number, from 0."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}/{number}/{prompt}".encode()).digest())
