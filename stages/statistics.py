"""Numbers with their uncertainty: means with bootstrap intervals, whether probabilities mean what they say, and how far
annotators agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction

import numpy as np


def summary(name: str, groups: Sequence[Sequence[float]], resamples: int, seed: int) -> dict[str, float]:
    """Mean over groups (prompts) of each group's mean, with its 95% bootstrap interval over groups in `_low` and `_high`."""
    if not groups:
        return {}
    means = np.array([np.mean(group) for group in groups])
    picks = np.random.default_rng(seed).integers(0, len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return {name: float(means.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def calibration(
    confidences: np.ndarray, right: np.ndarray, bins: int = 5, what: str = "pairs"
) -> tuple[float, list[dict[str, float | int]]]:
    """Expected calibration error (Guo et al., arXiv 1706.04599) and its table, for confidences in [0.5, 1] of a choice of two.

    The error is the mean over choices of |confidence - accuracy| of the bin they are in; bins are of equal width.
    """
    places = np.clip(((confidences - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    rows: list[dict[str, float | int]] = []
    for place in range(bins):
        inside = places == place
        if count := int(inside.sum()):
            said, was = float(confidences[inside].mean()), float(right[inside].mean())
            rows.append({"from": 0.5 + 0.5 * place / bins, what: count, "confidence": said, "accuracy": was})
    error = sum(row[what] * abs(row["confidence"] - row["accuracy"]) for row in rows) / max(1, len(confidences))
    return float(error), rows


def by_quantile(values: np.ndarray, right: np.ndarray, parts: int = 4) -> list[dict[str, float | int]]:
    """Accuracy in `parts` parts of equal size, by rising value; equal values are never parted."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, parts + 1)[1:-1])) if len(values) else np.zeros(0)
    places = np.searchsorted(edges, values, side="left")
    rows: list[dict[str, float | int]] = []
    for place in np.unique(places):
        inside = places == place
        low, high = float(values[inside].min()), float(values[inside].max())
        rows.append({"from": low, "to": high, "pairs": int(inside.sum()), "accuracy": float(right[inside].mean())})
    return rows


def pairwise_agreement(units: Iterable[Iterable[Hashable]]) -> float | None:
    """Of all pairs of values that annotators gave to one unit, the share that are equal; None without such a pair."""
    equal = pairs = 0
    for values in map(Counter, units):
        count = values.total()
        pairs += count * (count - 1)
        equal += sum(one * (one - 1) for one in values.values())
    return equal / pairs if pairs else None


def krippendorff_alpha(units: Iterable[Iterable[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values (Computing Krippendorff's Alpha-Reliability, 2011): 1 is full agreement, 0 what
    chance gives, below 0 less than that. A unit is what its annotators gave it, those that gave it nothing left out.

        alpha = 1 - (1 - sum_c o_cc / n) / (1 - sum_c n_c (n_c - 1) / (n (n - 1)))

    of the n values in units that have at least two; o_cc are those that coincide, n_uc (n_uc - 1) / (m_u - 1) in a unit of m_u
    values. None when there are none, or when all values are equal: chance would then agree as much.
    """
    coincide, totals = Fraction(0), Counter[Hashable]()
    for values in map(Counter, units):
        if (count := values.total()) > 1:
            totals += values
            coincide += Fraction(sum(one * (one - 1) for one in values.values()), count - 1)
    n = totals.total()
    by_chance = sum(one * (one - 1) for one in totals.values())
    if n * (n - 1) == by_chance:
        return None
    return float(1 - (1 - coincide / n) / (1 - Fraction(by_chance, n * (n - 1))))
