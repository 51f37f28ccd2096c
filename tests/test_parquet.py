"""Datasets on disk: one spelling of equal rows, plain Parquet for others, errors that name row and column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.parquet import ROWS_PER_GROUP, RowWriter, count_rows, read_rows, read_schema, write_rows
from stages.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": [{"role": "user", "content": "héllo"}], "label": True, "margin": 0.5, "tags": ["x", "y"]},
    {"id": "b", "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "2"}], "label": False},
    {"id": "c", "prompt": [{"role": "user", "content": "3"}], "label": None, "margin": None, "tags": []},
]
COMPLETE = [{"margin": None, "tags": None} | row for row in ROWS]
COLUMNS = ["id", "prompt", "label", "margin", "tags"]


def small(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"number": number, "text": f"row {number}"}


def test_equal_rows_give_equal_bytes(dataset: Callable[..., Path]) -> None:
    one, two = dataset(ROWS, "one"), dataset([dict(row) for row in ROWS], "two")
    assert (one / "data.parquet").read_bytes() == (two / "data.parquet").read_bytes()
    assert [path.name for path in one.iterdir()] == ["data.parquet"]
    other = dataset([*ROWS[:2], ROWS[2] | {"id": "d"}], "other")
    assert (one / "data.parquet").read_bytes() != (other / "data.parquet").read_bytes()


def test_rows_come_back(dataset: Callable[..., Path]) -> None:
    folder = dataset(ROWS)
    assert list(read_rows(folder)) == COMPLETE
    assert list(read_rows(folder / "data.parquet")) == COMPLETE
    assert count_rows(folder) == 3
    assert read_schema(folder).names == COLUMNS
    assert read_schema(folder).field("prompt").type.value_type == pa.struct([("role", pa.string()), ("content", pa.string())])


def test_plain_pyarrow_and_datasets_read_the_folder(dataset: Callable[..., Path], tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = dataset(ROWS)
    assert pq.read_table(folder).to_pylist() == COMPLETE
    loaded: Any = load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == COLUMNS
    assert loaded.to_list() == COMPLETE


VALUES = st.fixed_dictionaries(
    {"text": st.text(max_size=4), "number": st.none() | st.integers(-9, 9), "share": st.none() | st.floats(allow_nan=False)},
    optional={"messages": st.lists(st.fixed_dictionaries({"role": st.text(max_size=2), "content": st.text(max_size=3)}))},
)


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8))
def test_any_rows_come_back(rows: list[dict[str, Any]]) -> None:
    names = {name for row in rows for name in row}
    with TemporaryDirectory() as folder:
        assert write_rows(Path(folder), rows) == len(rows)
        assert list(read_rows(Path(folder))) == [{name: row.get(name) for name in names} for row in rows]


def test_more_rows_than_a_group_are_streamed(tmp_path: Path) -> None:
    on_disk: list[bool] = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in small(5000):
            on_disk.append((tmp_path / "data.parquet").exists())
            yield row

    assert write_rows(tmp_path, rows()) == 5000
    assert on_disk == [False] * ROWS_PER_GROUP + [True] * (5000 - ROWS_PER_GROUP)
    metadata = pq.ParquetFile(tmp_path / "data.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4096, 904]
    assert list(read_rows(tmp_path)) == list(small(5000))
    assert count_rows(tmp_path) == 5000
    assert next(read_rows(tmp_path)) == {"number": 0, "text": "row 0"}


MISFITS: list[tuple[str, list[Any], str]] = [
    ("text among integers", [1, 2, "three"], "row 3: column \"x\" holds 'three', where earlier rows hold int64"),
    ("integer among texts", ["a", None, 3], 'row 3: column "x" holds 3, where earlier rows hold string'),
    (
        "text among messages",
        [[{"role": "user", "content": "a"}], "b"],
        "row 2: column \"x\" holds 'b', where earlier rows hold list",
    ),
    ("too large", [1, 2**70], f'row 2: column "x" holds {2**70}, where earlier rows hold int64'),
]


@pytest.mark.parametrize(("values", "message"), [case[1:] for case in MISFITS], ids=[case[0] for case in MISFITS])
@pytest.mark.parametrize("before", [0, ROWS_PER_GROUP], ids=["in the first group", "after it"])
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, values: list[Any], message: str, before: int) -> None:
    rows = [{"n": n, "x": value} for n, value in enumerate([values[0]] * before + values)]
    number = int(message.split(":")[0].removeprefix("row "))
    with pytest.raises(InputError) as error:
        write_rows(tmp_path, rows)
    assert str(error.value).startswith(message.replace(f"row {number}:", f"row {number + before}:"))


def test_a_column_that_comes_too_late_is_named_not_left_out(tmp_path: Path) -> None:
    rows = [*small(ROWS_PER_GROUP + 1), {"number": 0, "text": "", "label": True}]
    with pytest.raises(InputError, match='row 4098: column "label" is not among those of the earlier rows: number, text'):
        write_rows(tmp_path, rows)


def test_a_schema_given_is_kept_to(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.float64()), ("y", pa.string())])
    assert write_rows(tmp_path, [{"x": 1}, {"y": "a"}], schema) == 2
    assert list(read_rows(tmp_path)) == [{"x": 1.0, "y": None}, {"x": None, "y": "a"}]
    with pytest.raises(InputError, match="row 1: column \"x\" holds 'a', where earlier rows hold double"):
        write_rows(tmp_path, [{"x": "a"}], schema)


def test_a_column_of_nulls_is_text(dataset: Callable[..., Path]) -> None:
    assert read_schema(dataset([{"x": None, "y": 1}])).field("x").type == pa.string()


def test_no_rows_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows to write"):
        write_rows(tmp_path, [])
    assert RowWriter(tmp_path).close() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_schema_makes_an_empty_dataset(tmp_path: Path) -> None:
    assert RowWriter(tmp_path, pa.schema([("x", pa.int64())])).close() == 0
    assert (list(read_rows(tmp_path)), count_rows(tmp_path), read_schema(tmp_path).names) == ([], 0, ["x"])


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        (tmp_path / name).mkdir(parents=True)
        write_rows(tmp_path / name, [{"name": name}])
    assert [row["name"] for row in read_rows(tmp_path)] == ["a", "b", "c/d"]
    assert count_rows(tmp_path) == 3


@pytest.mark.parametrize("keep", [0, 3, 12, 0.5, -1], ids=["empty", "3 bytes", "12 bytes", "half", "all but one byte"])
def test_a_truncated_file_is_an_input_error(dataset: Callable[..., Path], keep: float) -> None:
    folder = dataset(ROWS)
    content = (folder / "data.parquet").read_bytes()
    (folder / "data.parquet").write_bytes(content[: len(content) // 2 if keep == 0.5 else int(keep)])
    for read in (lambda: list(read_rows(folder)), lambda: count_rows(folder), lambda: read_schema(folder)):
        with pytest.raises(InputError, match=r"data\.parquet: not a readable Parquet file, perhaps cut short"):
            read()


def test_a_folder_without_parquet_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no Parquet file there"):
            list(read_rows(folder))


def test_a_column_that_is_null_for_long_may_say_what_it_holds(tmp_path: Path) -> None:
    rows = [{"x": None}] * 4096 + [{"x": 1.5}]
    write_rows(tmp_path, rows, types={"x": pa.float64()})
    assert pq.read_table(tmp_path)["x"].to_pylist()[-1] == 1.5


@pytest.mark.parametrize(("whole", "fraction"), [(1, 1.5), ([1], [1, 2.5])], ids=["number", "list"])
def test_a_fraction_among_integers_is_refused_not_cut_off(tmp_path: Path, whole: Any, fraction: Any) -> None:
    rows = [{"n": whole}] * 4096 + [{"n": fraction}]
    with pytest.raises(InputError, match=r'row 4097: column "n" holds .*, where earlier rows hold '):
        write_rows(tmp_path, rows)
