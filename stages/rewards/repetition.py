"""A penalty for repeated n-grams (arXiv 2502.03373, appendix C.2, as in open-r1)."""

from __future__ import annotations

from collections.abc import Sequence

from stages.errors import InputError
from stages.rewards.base import Row, Score
from stages.rewards.text import words


def repetition(completions: Sequence[str], rows: Sequence[Row], n: int = 3, max_penalty: float = 1.0) -> list[Score | None]:
    """-max_penalty * (1 - distinct n-grams / n-grams), of words; 0 for what has no n words."""
    del rows
    if n < 1 or max_penalty < 0:
        raise InputError(f"repetition: n is {n} and must be at least 1; max_penalty is {max_penalty} and must not be negative")
    return [Score(-max_penalty * _repeated(words(text), n)) for text in completions]


def _repeated(of: list[str], n: int) -> float:
    grams = list(zip(*(of[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
