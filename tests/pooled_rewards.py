"""Rewards for the tests of the process pool, in a file that a worker imports in no time."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stages.errors import InputError
from stages.rewards import pool
from stages.rewards.base import Row, Score


def odd(completions: Sequence[str], rows: Sequence[Row], extra: float = 0.0) -> list[Score | None]:
    """A reward for these tests, which does as each completion says."""
    return [_odd(text, row, extra) for text, row in zip(completions, rows, strict=True)]


def _odd(text: str, row: Row, extra: float) -> Score | None:
    if text == "hang":
        time.sleep(600)
    if text == "hang in C":  # without a moment for a signal handler in Python
        str(10 ** (10**9))
    if text == "crash":
        os._exit(3)
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        bytearray(2**60)
    if text == "much memory":
        len(bytearray(2 * pool.MEMORY))
    if text == "raise":
        raise KeyError("in the worker's words")
    if text == "input error":
        raise InputError("in the reward's own words")
    if text == "exit":
        sys.exit(4)
    if text == "none":
        return None
    if text == "who":
        return Score(float(os.getpid()), note=" ".join(name for name in ("torch", "transformers") if name in sys.modules))
    if text.startswith("slow"):
        time.sleep(random.random() / 20)
    return Score(len(text) + row["n"] + extra, {"n": row["n"]}, [1.0], [0], "kept")


def heard(completions: Sequence[str], rows: Sequence[Row], folder: str, hangs: int = 0, gaps: int = 0) -> list[Score | None]:
    """A number from 0 to 1 that the text's letters say; leaves a file of that name in `folder`. About one in `hangs` is never
    done, and about one in `gaps` has no verdict, which a note says."""
    return [_heard(text, Path(folder), hangs, gaps) for text in completions]


def _heard(text: str, folder: Path, hangs: int, gaps: int) -> Score:
    number = number_of(text)
    (folder / f"{number}").touch()
    if hangs and number % hangs == 0:
        time.sleep(600)
    if gaps and number % gaps == 0:
        return Score(None, note="no verdict today")
    return Score(number % 7 / 6, step_scores=[number % 3, 1.0], step_ends=[0, max(0, len(text) - 1)], note="heard")


def number_of(text: str) -> int:
    return sum(place * ord(letter) for place, letter in enumerate(text, start=3))


def two_for_one(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    return [Score(0.0)] * 2
