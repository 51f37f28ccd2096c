"""Intervals and calibration: against the normal distribution, by hand, and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.statistics import by_quantile, calibration, krippendorff_alpha, pairwise_agreement, summary


def test_the_mean_is_over_prompts_not_samples() -> None:
    found = summary("x", [[1, 0], [1], [0, 0, 1]], 500, 0)
    assert found["x"] == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    assert list(found) == ["x", "x_low", "x_high"]
    # Resampled means are thirds of sums of these three: the smallest and largest ones are drawn 1 time in 27 each.
    assert (found["x_low"], found["x_high"]) == (pytest.approx(1 / 3), pytest.approx(1))
    assert summary("x", [[0.25]], 100, 0) == {"x": 0.25, "x_low": 0.25, "x_high": 0.25}
    assert summary("x", [], 100, 0) == {}


def test_the_interval_is_that_of_the_normal_distribution_for_many_prompts() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=800)
    found = summary("x", [[value] for value in values], 4000, 1)
    width = 1.96 * values.std() / math.sqrt(800)
    assert found["x"] == pytest.approx(values.mean())
    assert found["x_low"] == pytest.approx(values.mean() - width, abs=0.05 * width)
    assert found["x_high"] == pytest.approx(values.mean() + width, abs=0.05 * width)


@settings(max_examples=30, deadline=None)
@given(groups=st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=3), min_size=1, max_size=6), times=st.integers(2, 4))
def test_more_samples_of_the_same_prompts_do_not_narrow_the_interval(groups: list[list[float]], times: int) -> None:
    once, often = summary("x", groups, 100, 0), summary("x", [group * times for group in groups], 100, 0)
    assert often == pytest.approx(once, abs=1e-9)
    assert once["x_low"] <= once["x"] + 1e-9
    assert once["x_high"] >= once["x"] - 1e-9


def test_calibration_by_hand() -> None:
    error, rows = calibration(np.array([0.55, 0.58, 0.95, 1.0]), np.array([True, False, True, True]))
    assert [row["pairs"] for row in rows] == [2, 2]
    assert [row["from"] for row in rows] == pytest.approx([0.5, 0.9])
    assert [row["accuracy"] for row in rows] == [0.5, 1.0]
    assert error == pytest.approx((2 * 0.065 + 2 * 0.025) / 4)
    assert calibration(np.zeros(0), np.zeros(0, bool)) == (0.0, [])


def test_a_perfectly_calibrated_judge_has_a_small_error_and_a_boaster_a_large_one() -> None:
    rng = np.random.default_rng(0)
    said = rng.uniform(0.5, 1, 20000)
    right = rng.random(20000) < said
    assert calibration(said, right)[0] < 0.01
    assert calibration(np.full(20000, 0.99), right)[0] == pytest.approx(0.24, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=40), parts=st.integers(1, 5))
def test_quantiles_keep_all_values_and_never_part_equal_ones(values: list[int], parts: int) -> None:
    array = np.array(values, dtype=float)
    rows = by_quantile(array, array > 2, parts)
    assert sum(row["pairs"] for row in rows) == len(values)
    assert len(rows) <= parts
    ends = [(row["from"], row["to"]) for row in rows]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
    right = sum(row["pairs"] * row["accuracy"] for row in rows)
    assert right == pytest.approx(float((array > 2).sum()))


def test_quantiles_have_equal_sizes_where_values_differ() -> None:
    values = np.random.default_rng(0).permutation(40).astype(float)
    assert [row["pairs"] for row in by_quantile(values, values > 0)] == [10, 10, 10, 10]
    assert by_quantile(np.zeros(0), np.zeros(0, bool)) == []


# What observers gave each unit, one unit after another, what is missing left out: Krippendorff, Computing Krippendorff's
# Alpha-Reliability (2011), the examples A (two observers, binary), B (two, nominal) and C (four, with missing values), with the
# alphas that it gives; and the example of three observers and 15 units which Wikipedia's article on it works out.
EXAMPLES = [
    ("01 11 01 00 00 01 00 00 10 00", "0.095", 16 / 168),
    ("ab aa bb bb db cc cc cc ee dd dd ad", "0.692", 310 / 448),
    ("111 2232 3333 3333 2222 1234 4444 1121 2222 555 11 3", "0.743", 904 / 1216),
    ("1  22 11 33 334 444 13 22 11 11 33 33  34", "0.691", 336 / 486),
]


@pytest.mark.parametrize(("units", "published", "exact"), EXAMPLES)
def test_alpha_is_that_of_the_worked_examples(units: str, published: str, exact: float) -> None:
    found = krippendorff_alpha(units.split(" "))
    assert found == exact
    assert f"{found:.3f}" == published


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=8))
def test_alpha_is_observed_over_expected_disagreement(units: list[list[str]]) -> None:
    """By brute force over pairs, as the paper defines it."""
    pairable = [unit for unit in units if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    expected = sum(a != b for a, b in itertools.permutations(values, 2))
    found = krippendorff_alpha(units)
    if not expected:
        assert found is None
        return
    pairs = [(a != b, 1 / (len(unit) - 1)) for unit in pairable for a, b in itertools.permutations(unit, 2)]
    observed = sum(differ * weight for differ, weight in pairs) / len(values)
    assert found == pytest.approx(1 - observed / (expected / (len(values) * (len(values) - 1))))
    assert pairwise_agreement(units) == pytest.approx(sum(not differ for differ, _ in pairs) / len(pairs))


def test_agreement_without_pairs_is_unknown() -> None:
    assert pairwise_agreement(["a", "", "b"]) is None
    assert krippendorff_alpha(["a", "", "b"]) is None
    assert (pairwise_agreement(["aa"]), krippendorff_alpha(["aa"])) == (1, None)
    assert (pairwise_agreement(["ab"]), krippendorff_alpha(["ab", "ab"])) == (0, pytest.approx(-1 / 2))
