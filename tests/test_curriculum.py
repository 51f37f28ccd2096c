"""Which prompts a curriculum keeps and in which order, and what it says of the others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.curriculum import in_curriculum
from stages.errors import InputError
from stages.run import Run
from stages.specs.grpo import Curriculum

Rows = list[dict[str, Any]]
NAN = math.nan


def rows_of(*values: Any, column: str = "pass_rate") -> Rows:
    return [{"id": f"{place}", column: value} for place, value in enumerate(values)]


def kept(path: Path, rows: Rows, **curriculum: Any) -> tuple[list[int], dict[str, int]]:
    """The numbers of the rows that are kept, and what is counted."""
    run = Run(path / "run", {})
    found = in_curriculum(run, rows, Curriculum(**curriculum))
    assert all(row is rows[int(row["id"])] for row in found)
    [event] = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert event["name"] == "curriculum"
    return [int(row["id"]) for row in found], {row["what"]: row["rows"] for row in event["rows"]}


RATES = (0.5, 0.0, 1.0, 0.25, None, 0.5, NAN, 1)


@pytest.mark.parametrize(
    ("curriculum", "places"),
    [
        ({}, [0, 1, 2, 3, 5, 7]),
        ({"order": "shuffled", "minimum": 0.1}, [0, 2, 3, 5, 7]),
        # Both bounds are within.
        ({"minimum": 0.25, "maximum": 0.5}, [0, 3, 5]),
        ({"minimum": 0.5}, [0, 2, 5, 7]),
        ({"maximum": 0.5}, [0, 1, 3, 5]),
        ({"maximum": 0.0}, [1]),
        ({"minimum": 1.0, "maximum": 1.0}, [2, 7]),
        # Equal ones stay in the order of the dataset, whichever way it goes.
        ({"order": "rising"}, [1, 3, 0, 5, 2, 7]),
        ({"order": "falling"}, [2, 7, 0, 5, 3, 1]),
        ({"order": "falling", "maximum": 0.9}, [0, 5, 3, 1]),
        ({"order": "rising", "minimum": 0.3}, [0, 5, 2, 7]),
    ],
)
def test_rows_within_the_bounds_in_their_order(tmp_path: Path, curriculum: dict[str, Any], places: list[int]) -> None:
    found, counts = kept(tmp_path, rows_of(*RATES), **curriculum)
    assert found == places
    assert list(counts.values()) == [len(places), 6 - len(places), 2]


def test_what_is_left_out_is_counted_in_words(tmp_path: Path) -> None:
    rows = rows_of(1, 5, None, 9, NAN, "3", column="level")
    _, counts = kept(tmp_path, rows, column="level", minimum=2, maximum=6)
    assert counts == {"used": 1, "left out: level out of bounds": 2, "left out: no level": 3}


@pytest.mark.parametrize("value", ["0.5", "", [0.5], {"rate": 0.5}])
def test_what_is_no_number_is_no_number(tmp_path: Path, value: Any) -> None:
    assert kept(tmp_path, rows_of(0.5, value), minimum=0.0)[0] == [0]


def test_infinite_numbers_are_within_no_bound_but_their_own_side(tmp_path: Path) -> None:
    rows = rows_of(math.inf, -math.inf, 0.0)
    for place, (curriculum, places) in enumerate([({"minimum": 0.0}, [0, 2]), ({"maximum": 0.0}, [1, 2]), ({}, [0, 1, 2])]):
        (tmp_path / f"{place}").mkdir()
        assert kept(tmp_path / f"{place}", rows, **curriculum)[0] == places


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    message = r"curriculum is by the column 'difficulty', which the prompts do not have \(they have id, pass_rate\)"
    with pytest.raises(InputError, match=message):
        in_curriculum(run, rows_of(0.5), Curriculum(column="difficulty", minimum=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.1, 0.9), r"no prompt's pass_rate is within 0\.4 and 0\.6: the 2 that have one lie elsewhere"),
        ((0.1, None, NAN), r"within 0\.4 and 0\.6: the 1 that have one lie elsewhere"),
        ((None, NAN, "0.5"), r"within 0\.4 and 0\.6: the 0 that have one lie elsewhere"),
    ],
)
def test_when_no_prompt_is_left_it_says_so(tmp_path: Path, values: tuple[Any, ...], message: str) -> None:
    run = Run(tmp_path / "run", {})
    with pytest.raises(InputError, match=message):
        in_curriculum(run, rows_of(*values), Curriculum(minimum=0.4, maximum=0.6))
    assert not (run.folder / "events.jsonl").exists()


bounds = st.one_of(st.none(), st.integers(0, 8).map(lambda n: n / 8))
rates = st.lists(st.one_of(st.none(), st.just(NAN), st.integers(0, 8).map(lambda n: n / 8)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(values=rates, minimum=bounds, maximum=bounds, order=st.sampled_from(["shuffled", "rising", "falling"]))
def test_any_bounds_keep_what_a_loop_keeps(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], minimum: float | None, maximum: float | None, order: Any
) -> None:
    rows, expected = rows_of(*values), []
    for place, value in enumerate(values):
        if value is None or math.isnan(value):
            continue
        if (minimum is None or value >= minimum) and (maximum is None or value <= maximum):
            expected.append(place)
    if order != "shuffled":
        sign = 1 if order == "rising" else -1
        expected.sort(key=lambda place: (sign * values[place], place))
    curriculum: dict[str, Any] = {"minimum": minimum, "maximum": maximum, "order": order}
    folder = tmp_path_factory.mktemp("curriculum")
    if not expected:
        with pytest.raises(InputError, match="no prompt's pass_rate is within"):
            in_curriculum(Run(folder / "run", {}), rows, Curriculum(**curriculum))
        return
    assert kept(folder, rows, **curriculum)[0] == expected
