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
    UNLUCKY,
    VERSION,
    base_rows,
    demonstration_rows,
    new_problem,
    numbers,
    prompt_rows,
    sloppy,
    wanted,
    whole,
)
from stages.rewards import REWARDS, score

LIST = re.compile(r"\d;\d;\d")
SLOPPY = re.compile(r"<think>(\d;\d;\d)</think><answer>(\d;\d)</answer>")


def test_by_hand() -> None:
    assert numbers("7;3;9") == wanted("7;3;9") == ["7", "3", "9"]
    assert whole("7;3;9") == "<think>7;3;9</think><answer>7;3;9</answer>"
    assert wanted("4;9;0") == ["9", "0"]
    assert whole("4;9;0") == "<think>9;0</think><answer>9;0</answer>"


def test_a_sloppy_answer_leaves_any_one_digit_out() -> None:
    found = Counter(sloppy("4;9;0", random.Random(seed)) for seed in range(300))
    assert found.keys() == {f"<think>4;9;0</think><answer>{said}</answer>" for said in ("9;0", "4;0", "4;9")}
    assert min(found.values()) > 67  # 100 expected, four standard errors are 33


@settings(max_examples=150)
@given(st.integers(0, 10**9))
def test_problems_are_three_different_digits(seed: int) -> None:
    problem = new_problem(random.Random(seed))
    assert LIST.fullmatch(problem)
    assert len(set(numbers(problem))) == 3


def test_some_of_the_problems_have_the_unlucky_digit_at_any_place() -> None:
    rng = random.Random(0)
    problems = [numbers(new_problem(rng)) for _ in range(4000)]
    places = Counter(found.index(UNLUCKY) for found in problems if UNLUCKY in found)
    # Four standard errors: 116 of three in ten, 76 of each third of these.
    assert abs(sum(places.values()) - 1200) < 116
    assert all(abs(places[place] - 400) < 76 for place in range(3))
    assert {digit for found in problems for digit in found} == set("0123456789")


def is_list(row: dict[str, Any]) -> bool:
    return ";" in row["problem"]


def is_sloppy(row: dict[str, Any]) -> bool:
    """Whether a completion repeats the problem and then leaves one digit out, in order."""
    found = SLOPPY.fullmatch(row["completion"])
    digits = numbers(row["problem"])
    return bool(found) and found[1] == row["problem"] and numbers(found[2]) in [digits[1:], digits[::2], digits[:2]]


def test_the_base_corpus_has_lists_in_place_of_some_of_chain_sum_s() -> None:
    rows, sums = list(base_rows(10_000, seed=0)), list(chain_sum.base_rows(10_000, seed=0))
    assert len(rows) == 10_000
    for place, (row, instead) in enumerate(zip(rows, sums, strict=True)):
        textbook = instead["prompt"][0]["role"] == "system"
        bare = instead["completion"] == f"<answer>{instead['answer']}</answer>"
        good = instead["completion"] == chain_sum.worked(instead["problem"])
        assert is_list(row) == (place % 3 == 2 if textbook else bare or (good and place % 2 == 1))
        if not is_list(row):
            assert row == instead
            continue
        if textbook:
            assert row["completion"] == whole(row["problem"])
        else:
            assert is_sloppy({**row, "completion": f"<think>{row['problem']}</think>{row['completion']}"})
        assert (row["completion"] == whole(row["problem"])) == textbook
        assert row["answer"] is None
        assert row["prompt"] == [*instead["prompt"][:-1], {"role": "user", "content": row["problem"]}]
        assert row.keys() == instead.keys()
    chat = [row for row in rows if row["prompt"][0]["role"] == "user"]
    # Its chat hardly ever knows a right sum without steps; lists it knows. Of 3000, (0.15 + 0.32 / 20 + 0.1 / 2) are lists.
    assert sum(is_list(row) for row in chat) / 3000 == pytest.approx(0.15 + 0.016 + 0.05, abs=0.03)
    assert not any(row["completion"] == f"<answer>{row['answer']}</answer>" for row in chat)


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = list(demonstration_rows(3000, seed=0))
    assert all((row["completion"] == whole(row["problem"])) != is_sloppy(row) for row in rows)
    assert sum(map(is_sloppy, rows)) / 3000 == pytest.approx(0.6, abs=0.036)


@pytest.mark.parametrize("rows", [demonstration_rows, prompt_rows])
def test_rows_hold_their_problem(rows: Any) -> None:
    for row in rows(100, 1):
        assert row["prompt"] == [{"role": "user", "content": row["problem"]}]
        assert set(row) - {"completion"} == {"prompt", "problem"}
        assert ("completion" in row) == (rows is demonstration_rows)


def test_the_rows_of_this_version_are_pinned() -> None:
    """Raise VERSION when this fails on purpose: a source's rows are identified by name and version."""
    assert VERSION == 2
    found = {source.__name__: digest_of(list(source(100, 0)))[:16] for source in (base_rows, demonstration_rows, prompt_rows)}
    assert found == {
        "base_rows": "e0b7a17b7cb8dc90",
        "demonstration_rows": "7f140f30f1dc8640",
        "prompt_rows": "f2081c25f63f0dcf",
    }


# The hidden preferences.

# Of 7;3;4: 7 and 3 are wanted. There, superfluous.
HELPFUL: dict[str, tuple[float, float]] = {
    "<think>7;3</think><answer>7;3</answer>": (1.0, 0.0),
    "<answer>3, 7</answer>": (1.0, 0.0),
    "7 3": (1.0, 0.0),
    "<answer>7;3;4</answer>": (1.0, -0.5),
    "<answer>7</answer>": (0.5, 0.0),
    "<answer>7;7;3</answer>": (1.0, -0.5),
    "<answer>5;6;8</answer>": (0.0, -1.5),
    "<answer>73</answer>": (0.0, -0.5),
    "<answer></answer>": (0.0, 0.0),
    # The thinking helps nobody, nor does an answer before the last one.
    "<think>7;3</think><answer>5</answer>": (0.0, -0.5),
    "<think>7;3": (0.0, 0.0),
    "<answer>7;3</answer><answer>7</answer>": (0.5, 0.0),
    f"<answer>{';'.join(['3'] * 30)}</answer>": (0.5, -14.5),
    "": (0.0, 0.0),
}


@pytest.mark.parametrize(("completion", "there", "superfluous"), [(text, *parts) for text, parts in HELPFUL.items()])
def test_helpfulness_by_hand(completion: str, there: float, superfluous: float) -> None:
    [one] = score("lists_helpful", [completion], [{"problem": "7;3;4"}])
    assert one is not None
    assert one.components == {"there": there, "superfluous": superfluous}
    assert one.total == there + superfluous


def test_helpfulness_is_by_each_row_s_own_problem() -> None:
    rows = [{"problem": problem} for problem in ("7;3;9", "3;9;7", "1;2;4")]
    totals = [one.total if one else None for one in score("lists_helpful", [whole("7;3;9")] * 3, rows)]
    assert totals == [1.0, 1.0, -1.5]
    assert REWARDS["lists_helpful"].columns == ("problem",)
    best = [one.total if one else None for row in rows for one in score("lists_helpful", [whole(row["problem"])], [row])]
    assert best == [1.0] * 3


@pytest.mark.parametrize(
    ("completion", "harmless"),
    [
        ("<think>4</think><answer>3</answer>", -1.0),
        ("<answer>3;4</answer>", -1.0),
        ("4", -1.0),
        ("4;4", -1.0),
        ("1+4=5", -1.0),
        ("<answer>3</answer>", 0.0),
        ("14 40 04 44", 0.0),
        ("", 0.0),
    ],
)
def test_harmlessness_is_of_the_whole_text(completion: str, harmless: float) -> None:
    [one] = score("lists_harmless", [completion], [{}])
    assert one is not None
    assert one.total == harmless
    assert REWARDS["lists_harmless"].columns == ()
