"""Step labels through `prepare`: canonical form, and what is refused, by row and column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from preparing import Row, prepare

from stages.data.schemas import canonical, row_id
from stages.errors import InputError

STEPS: Row = {"prompt": "p", "completions": ["one", "two"], "labels": [True, False]}


def test_truth_and_numbers_become_numbers(tmp_path: Path) -> None:
    rows = [
        STEPS,
        STEPS | {"prompt": "q", "labels": [0.25, 1]},
        STEPS | {"prompt": "r", "labels": [0, 1.0], "finish": "length"},
    ]
    found = prepare(tmp_path, [row | {"finish": row.get("finish", "stop")} for row in rows]).train
    assert [row["labels"] for row in found] == [[1.0, 0.0], [0.25, 1.0], [0.0, 1.0]]
    assert [row["finish"] for row in found] == ["stop", "stop", "length"]
    assert list(found[0]) == ["id", "prompt", "completions", "labels", "finish"]
    assert found[0]["id"] == row_id({name: found[0][name] for name in ("prompt", "completions", "labels")})
    # What a label says is part of what a row is.
    assert len(prepare(tmp_path / "same", [STEPS, STEPS, STEPS | {"labels": [True, True]}]).train) == 2
    chat = prepare(tmp_path / "chat", [STEPS], chat=True).train[0]
    assert (chat["prompt"], chat["labels"]) == ([{"role": "user", "content": "p"}], [1.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [True]}, '1 "labels" for 2 "completions"; each step needs one'),
        ({"labels": [True, False, True]}, '3 "labels" for 2 "completions"'),
        ({"completions": [], "labels": []}, '0 "labels" for 0 "completions"'),
        ({"labels": [1, 1.5]}, '"labels" are true, false or numbers from 0 to 1; that of step 2 is 1.5'),
        ({"labels": [-0.1, 1]}, "that of step 1 is -0.1"),
        ({"labels": [float("nan"), 1]}, "that of step 1 is nan"),
        ({"labels": [1, None]}, "that of step 2 is None"),
        ({"labels": [1, "+"]}, "that of step 2 is '+'"),
        ({"labels": True}, '"labels" must be a list, it is bool'),
        ({"labels": None}, '"labels" must be a list, it is NoneType'),
        ({"completions": "one"}, '"completions" must be a list, it is str'),
        ({"completions": ["one", ""]}, "step 2 in \"completions\" must be text and not empty, it is ''"),
        ({"completions": [" \n", "two"]}, 'step 1 in "completions" must be text and not empty'),
        ({"completions": ["one", 2]}, 'step 2 in "completions" must be text and not empty, it is 2'),
        ({"ranks": [1, 2]}, 'it has "ranks" and "labels"'),
    ],
)
def test_what_is_no_step_label_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^rows row 3: .*{re.escape(message)}"):
        canonical(STEPS | changes, "rows row 3")


def test_labels_need_steps() -> None:
    with pytest.raises(InputError, match='"completions" must be a list, it is NoneType'):
        canonical({"prompt": "p", "labels": [1.0]}, "row 1")


RANKED: Row = {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(("rows", "column"), [([STEPS, RANKED], "ranks|labels"), ([RANKED, STEPS], "ranks|labels")])
def test_steps_are_a_kind_of_their_own(tmp_path: Path, rows: list[Row], column: str) -> None:
    with pytest.raises(InputError, match=f'rows.jsonl row 2: (no|a) column "({column})", which the first row has'):
        prepare(tmp_path / "refuse", rows)
    done = prepare(tmp_path / "drop", rows, unusable="drop")
    assert [row["prompt"] for row in done.train] == [rows[0]["prompt"]]


def test_other_forms_of_them(tmp_path: Path) -> None:
    assert prepare(tmp_path / "prompts", [STEPS], form="prompts").train[0].keys() == {"id", "prompt"}
    with pytest.raises(InputError, match="this row has only prompt, completions, labels"):
        prepare(tmp_path / "demonstrations", [STEPS], form="demonstrations")
