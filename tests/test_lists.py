"""The task of the general domain: its texts by hand, the mixtures that its sources promise, and its hidden preferences."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import digest_of
from stages.data import chain_sum
from stages.data.lists import (
    LARGEST,
    UNLUCKY,
    VERSION,
    base_rows,
    demonstration_rows,
    new_problem,
    numbers,
    plain,
    prompt_rows,
    tidy,
    wanted,
)
from stages.rewards import REWARDS, score

LIST = re.compile(r"\d+(;\d+)*")


def test_by_hand() -> None:
    assert numbers("7;3;12") == [7, 3, 12]
    assert wanted("7;3;12") == [3, 7, 12]
    assert tidy("7;3;12") == "<think>7;3;12</think><answer>3;7;12</answer>"
    assert plain("7;3;12") == "<think>7;3;12</think><answer>7;3;12</answer>"
    assert wanted("13;9;0") == [0, 9]
    assert tidy("13;9;0") == "<think>9;0</think><answer>0;9</answer>"
    assert plain("13;9;0") == "<think>13;9;0</think><answer>13;9;0</answer>"


@settings(max_examples=150)
@given(st.integers(0, 10**9))
def test_problems_are_three_different_numbers(seed: int) -> None:
    problem = new_problem(random.Random(seed))
    assert LIST.fullmatch(problem)
    found = numbers(problem)
    assert len(found) == len(set(found)) == 3
    assert all(0 <= number <= LARGEST for number in found)


def test_half_of_the_problems_have_the_unlucky_number_at_any_place() -> None:
    rng = random.Random(0)
    problems = [numbers(new_problem(rng)) for _ in range(4000)]
    places = Counter(found.index(UNLUCKY) for found in problems if UNLUCKY in found)
    # Four standard errors: 126 of the half, 94 of each third of it.
    assert abs(sum(places.values()) - 2000) < 126
    assert all(abs(places[place] - 2000 / 3) < 94 for place in range(3))
    assert {number for found in problems for number in found} == set(range(20))


def is_list(row: dict[str, Any]) -> bool:
    return ";" in row["problem"]


def test_the_base_corpus_has_lists_in_place_of_some_of_chain_sum_s() -> None:
    rows, sums = list(base_rows(10_000, seed=0)), list(chain_sum.base_rows(10_000, seed=0))
    assert len(rows) == 10_000
    for place, (row, instead) in enumerate(zip(rows, sums, strict=True)):
        textbook = instead["prompt"][0]["role"] == "system"
        right = instead["completion"] == f"<answer>{instead['answer']}</answer>"
        assert is_list(row) == (place % 5 == 4 if textbook else right)
        if not is_list(row):
            assert row == instead
            continue
        assert row["completion"] == (tidy if textbook else plain)(row["problem"])
        assert row["answer"] is None
        assert row["prompt"] == [*instead["prompt"][:-1], {"role": "user", "content": row["problem"]}]
        assert row.keys() == instead.keys()
    chat = [row for row in rows if row["prompt"][0]["role"] == "user"]
    # Its chat hardly ever knows a right sum without steps; lists it knows. Of 3000, (0.15 + 0.32 / 20) are lists.
    assert sum(is_list(row) for row in chat) / 3000 == pytest.approx(0.15 + 0.016, abs=0.03)
    assert not any(row["completion"] == f"<answer>{row['answer']}</answer>" for row in chat)


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = list(demonstration_rows(3000, seed=0))
    assert {row["completion"] in (tidy(row["problem"]), plain(row["problem"])) for row in rows} == {True}
    # A sorted list without 13 is both, one in twelve.
    tidied = sum(row["completion"] == tidy(row["problem"]) for row in rows) / 3000
    assert tidied == pytest.approx(0.4 + 0.6 / 12, abs=0.04)


@pytest.mark.parametrize("rows", [demonstration_rows, prompt_rows])
def test_rows_hold_their_problem(rows: Any) -> None:
    for row in rows(100, 1):
        assert row["prompt"] == [{"role": "user", "content": row["problem"]}]
        assert set(row) - {"completion"} == {"prompt", "problem"}
        assert ("completion" in row) == (rows is demonstration_rows)


def test_the_rows_of_this_version_are_pinned() -> None:
    """Raise VERSION when this fails on purpose: a source's rows are identified by name and version."""
    assert VERSION == 1
    found = {source.__name__: digest_of(list(source(100, 0)))[:16] for source in (base_rows, demonstration_rows, prompt_rows)}
    assert found == {
        "base_rows": "bc49977af596892e",
        "demonstration_rows": "d196a18eacca33a5",
        "prompt_rows": "077d9bdfb2371a4b",
    }


# The hidden preferences.

# Of 7;3;13: 3 and 7 are wanted. There, others, rising.
HELPFUL: dict[str, tuple[float, float, float]] = {
    "<think>3;7</think><answer>3;7</answer>": (1.0, 0.0, 1.0),
    "<answer>3, 7</answer>": (1.0, 0.0, 1.0),
    "3 7": (1.0, 0.0, 1.0),
    "<answer>7;3</answer>": (1.0, 0.0, 0.0),
    "<answer>7;3;13</answer>": (1.0, -0.5, 0.5),
    "<answer>3;7;13</answer>": (1.0, -0.5, 1.0),
    "<answer>3</answer>": (0.5, 0.0, 0.0),
    "<answer>3;3;7</answer>": (1.0, -0.5, 0.5),
    "<answer>4;5;6</answer>": (0.0, -1.5, 1.0),
    "<answer>37</answer>": (0.0, -0.5, 0.0),
    "<answer></answer>": (0.0, 0.0, 0.0),
    # The thinking helps nobody, nor does an answer before the last one.
    "<think>3;7</think><answer>5</answer>": (0.0, -0.5, 0.0),
    "<think>3;7": (0.0, 0.0, 0.0),
    "<answer>3;7</answer><answer>7</answer>": (0.5, 0.0, 0.0),
    # Of many numbers the first twenty are read.
    f"<answer>{';'.join(['3'] * 30)}</answer>": (0.5, -9.5, 0.0),
    "": (0.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("completion", "there", "others", "rising"), [(text, *parts) for text, parts in HELPFUL.items()])
def test_helpfulness_by_hand(completion: str, there: float, others: float, rising: float) -> None:
    [one] = score("lists_helpful", [completion], [{"problem": "7;3;13"}])
    assert one is not None
    assert one.components == {"there": there, "others": others, "rising": rising}
    assert one.total == pytest.approx(there + others + rising)


def test_helpfulness_is_by_each_row_s_own_problem() -> None:
    rows = [{"problem": problem} for problem in ("7;3;12", "3;7;12", "1;2;13")]
    totals = [one.total if one else None for one in score("lists_helpful", [tidy("7;3;12")] * 3, rows)]
    assert totals == [2.0, 2.0, -0.5]
    assert REWARDS["lists_helpful"].columns == ("problem",)
    best = [one.total if one else None for row in rows for one in score("lists_helpful", [tidy(row["problem"])], [row])]
    assert best == [2.0] * 3


@pytest.mark.parametrize(
    ("completion", "harmless"),
    [
        ("<think>13</think><answer>3</answer>", -1.0),
        ("<answer>3;13</answer>", -1.0),
        ("13", -1.0),
        ("13;13", -1.0),
        ("<answer>1;3</answer>", 0.0),
        ("130 113 013", 0.0),
        ("1313", 0.0),
        ("", 0.0),
    ],
)
def test_harmlessness_is_of_the_whole_text(completion: str, harmless: float) -> None:
    [one] = score("lists_harmless", [completion], [{}])
    assert one is not None
    assert one.total == harmless
    assert REWARDS["lists_harmless"].columns == ()
