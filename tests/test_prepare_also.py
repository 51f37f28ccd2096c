"""`prepare` from two sources that make one dataset, and columns that every row gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from preparing import FIXED, Row, numbered, prepare, prompts

from stages.artifacts import sha256_file
from stages.data.schemas import row_id
from stages.errors import InputError

Make = Callable[..., Path]
CHAT: list[Row] = [{"prompt": [{"role": "user", "content": f"question {n}"}], "completion": f"{n}"} for n in range(6)]


def prepared(dataset: Make, rows: list[Row], name: str) -> Path:
    return dataset([{"id": row_id(row), **row} for row in rows], name)


# Constants.


def test_every_row_gets_the_constants(tmp_path: Path) -> None:
    rows: list[Row] = [FIXED[0], FIXED[1] | {"domain": "maths", "level": 3}, FIXED[2] | {"domain": None}]
    made = prepare(tmp_path, rows, constants={"domain": "general", "task": "x"})
    assert [(row["domain"], row["task"]) for row in made.train] == [("general", "x")] * 3
    assert [row["level"] for row in made.train] == [None, 3, None]
    plain = prepare(tmp_path / "plain", rows)
    assert [row["id"] for row in made.train] == [row["id"] for row in plain.train], "they are no part of a row's identity"
    assert prepare(tmp_path / "form", rows, constants={"domain": "general"}, form="prompts").train[0] == {
        "id": row_id({"prompt": "prompt 0"}), "prompt": "prompt 0", "domain": "general", "level": None,
    }  # fmt: skip


def test_filters_and_the_split_see_the_constants(tmp_path: Path) -> None:
    constants = {"domain": "general"}
    kept = prepare(tmp_path / "kept", FIXED, constants=constants, filters={"equals": {"domain": "general"}})
    assert len(kept.train) == 12
    with pytest.raises(InputError, match=r"no row is left for training.*domain is not maths"):
        prepare(tmp_path / "none", FIXED, constants=constants, filters={"equals": {"domain": "maths"}})
    with pytest.raises(InputError, match="no row is left for training"):
        prepare(tmp_path / "one side", FIXED, constants=constants, split_by="domain", heldout=0.9999)


# A second source.


def test_the_rows_of_both_with_the_columns_of_both(tmp_path: Path, dataset: Make) -> None:
    """What one has not is null there, with the other's type even where there is no value for long."""
    ours = [row | {"answer": str(n), "score": n + 0.5} for n, row in enumerate(numbered(5000))]
    theirs = [{"prompt": f"other {n}", "completion": "c", "score": 1.0, "level": n, "tags": ["a", "b"]} for n in range(3)]
    one, two = prepared(dataset, ours, "one"), prepared(dataset, theirs, "two")
    made = prepare(tmp_path, one, also=two)
    assert len(made.train) == 5003
    assert prompts(made.train) == [row["prompt"] for row in (*ours, *theirs)]
    assert made.train[0] == {
        "id": row_id(ours[0]), "prompt": "prompt 0", "completion": "completion 0", "answer": "0", "score": 0.5, "level": None,
        "tags": None,
    }  # fmt: skip
    assert made.train[-1] == {"id": row_id(theirs[2]), "answer": None, **theirs[2]}
    kinds = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "run" / "outputs" / "train" / "data.parquet")}
    assert (kinds["level"], kinds["answer"], kinds["score"]) == ("int64", "string", "double")
    assert kinds["tags"] == "list<element: string>"
    assert made.counts == {"read": 5003, "training": 5003}
    # The other way round the same rows, and the same bytes twice.
    files = []
    for name in ("again", "once more"):
        other = prepare(tmp_path / name, two, also=one)
        assert [row["id"] for row in other.train] == [row["id"] for row in (*made.train[-3:], *made.train[:-3])]
        assert {row["id"]: row for row in other.train} == {row["id"]: row for row in made.train}
        files.append(sha256_file(tmp_path / name / "run" / "outputs" / "train" / "data.parquet"))
    assert files[0] == files[1]


def test_columns_of_two_types_are_refused(tmp_path: Path, dataset: Make) -> None:
    one, two = (prepared(dataset, [FIXED[n] | {"answer": value}], str(n)) for n, value in enumerate(("1", 1)))
    message = 'the column "answer" holds string in one dataset and int64 in the other: they cannot be one'
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, one, also=two)
    # Unless the column does not stay as it is.
    made = prepare(tmp_path / "constant", one, also=two, constants={"answer": "x"})
    assert [row["answer"] for row in made.train] == ["x", "x"]
    whole, half = (dataset([{"prompt": f"{m}", "chosen": "a", "rejected": "b", "margin": m}], f"margin {m}") for m in (1, 0.5))
    made = prepare(tmp_path / "left out", whole, also=half, form="prompts")
    assert prompts(made.train) == ["1", "0.5"]


@pytest.mark.parametrize(
    ("config", "columns"),
    [
        ({"form": "prompts"}, ["id", "prompt", "level", "size"]),
        ({"form": "demonstrations"}, ["id", "prompt", "completion", "level", "size"]),
        ({}, ["id", "prompt", "chosen", "rejected", "margin", "level", "size"]),
    ],
)
def test_columns_that_the_form_leaves_out_do_not_come_back(
    tmp_path: Path, dataset: Make, config: dict[str, Any], columns: list[str]
) -> None:
    pairs = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "margin": 1.0} for n in range(4)]
    one = prepared(dataset, [row | {"level": 1} for row in pairs[:2]], "one")
    two = prepared(dataset, [row | {"size": 2} for row in pairs[2:]], "two")
    made = prepare(tmp_path, one, also=two, **config)
    assert len(made.train) == 4
    assert list(made.train[0]) == columns
    assert [(row["level"], row["size"]) for row in made.train] == [(1, None)] * 2 + [(None, 2)] * 2


def test_texts_of_both_become_chat_and_columns_are_mapped(tmp_path: Path, dataset: Make) -> None:
    one = dataset([{"question": f"q{n}", "reply": "r", "id": str(n)} for n in range(2)], "one")
    two = dataset([{"question": "q5", "reply": "s", "more": 7, "id": "5"}], "two")
    mapping = {"prompt": "question", "completion": "reply"}
    made = prepare(tmp_path, one, also=two, columns=mapping, chat=True, system="be brief")
    assert [row["prompt"][-1] for row in made.train] == [{"role": "user", "content": name} for name in ("q0", "q1", "q5")]
    assert [list(row) for row in made.train] == [["id", "prompt", "completion", "more"]] * 3
    assert [row["more"] for row in made.train] == [None, None, 7]


def test_the_split_and_what_is_excluded_apply_to_both(tmp_path: Path, dataset: Make) -> None:
    one, two = prepared(dataset, numbered(40)[:20], "one"), prepared(dataset, numbered(40)[20:], "two")
    whole = prepare(tmp_path / "whole", numbered(40), heldout=0.4)
    made = prepare(tmp_path / "both", one, also=two, heldout=0.4)
    assert (made.train, made.heldout) == (whole.train, whole.heldout)
    assert {int(name.split()[1]) // 20 for name in prompts(made.heldout)} == {0, 1}
    exclude = dataset([{"prompt": f"prompt {n}"} for n in (0, 39)], "exclude")
    made = prepare(tmp_path / "excluded", one, exclude, two)
    assert prompts(made.train) == [f"prompt {n}" for n in range(1, 39)]
    assert made.counts["removed from training: prompt is held out"] == 2


def test_a_prompt_held_out_of_one_source_is_kept_out_of_the_other(tmp_path: Path, dataset: Make) -> None:
    """Split by another column, the second source's row decides about a prompt of the first."""
    rows = [{"prompt": f"prompt {n % 20}", "completion": f"{n}", "problem": str(n)} for n in range(40)]
    one, two = prepared(dataset, rows[:20], "one"), prepared(dataset, rows[20:], "two")
    made = prepare(tmp_path, one, also=two, heldout=0.3, split_by="problem")
    whole = prepare(tmp_path / "whole", rows, heldout=0.3, split_by="problem")
    assert (made.train, made.heldout) == (whole.train, whole.heldout)
    assert not set(prompts(made.train)) & set(prompts(made.heldout))
    removed = 40 - len(made.train) - len(made.heldout)
    assert made.counts["removed from training: prompt is held out"] == removed > 0


def test_doubles_across_both_are_counted(tmp_path: Path, dataset: Make) -> None:
    one = prepared(dataset, [row | {"from": "one"} for row in FIXED[:3]], "one")
    two = prepared(dataset, [row | {"from": "two"} for row in FIXED[2:5]], "two")
    made = prepare(tmp_path, one, also=two)
    assert made.counts == {"read": 6, "duplicates": 1, "training": 5}
    assert [row["from"] for row in made.train] == ["one"] * 3 + ["two"] * 2
    assert len(prepare(tmp_path / "kept", one, also=two, deduplicate=False).train) == 6
    # As many rows of each as are asked for.
    few = prepare(tmp_path / "few", one, also=two, rows=2)
    assert [row["from"] for row in few.train] == ["one", "one", "two", "two"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([{"prompt": "p"}], 'row 1: no column "completion", which the first row has'),
        (
            [{"prompt": "p", "completion": "c", "label": True}],
            'row 1: a column "label", which the first row has not',
        ),
        (CHAT, r'the column "prompt" holds string in one dataset and list<.* in the other|"prompt" is a list of messages'),
    ],
    ids=["prompts", "unpaired", "chat"],
)
def test_kinds_that_differ_are_refused(tmp_path: Path, dataset: Make, other: list[Row], message: str) -> None:
    one, two = prepared(dataset, FIXED, "one"), prepared(dataset, other, "two")
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, one, also=two)


def test_a_source_that_is_not_prepared_is_refused(tmp_path: Path, dataset: Make) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(InputError, match=r"no Parquet file there; a dataset is a folder of \*\.parquet files"):
        prepare(tmp_path, prepared(dataset, FIXED, "one"), also=tmp_path / "raw")
