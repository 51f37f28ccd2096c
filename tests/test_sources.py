"""Raw rows from flat files, procedural sources and clones of hub datasets, each with the words that say where it stood."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.data.parquet import write_rows
from stages.data.procedural import PROCEDURAL
from stages.data.sources import read_source
from stages.errors import InputError
from stages.specs.prepare import PrepareConfig

ROWS: list[dict[str, Any]] = [{"prompt": "é", "n": 1}, {"prompt": 'two\nlines, "quoted"', "n": 2}, {"prompt": "c", "n": 3}]


def read(folder: Path, **config: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(read_source(folder, PrepareConfig(**config)))


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_gzipped(path: Path) -> None:
    write_jsonl(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_parquet(path: Path) -> None:
    write_rows(path.parent, ROWS)
    (path.parent / "data.parquet").rename(path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gzipped,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}
AS_READ = dict.fromkeys(WRITERS, ROWS) | {"csv": [row | {"n": str(row["n"])} for row in ROWS]}  # CSV holds texts only


@pytest.mark.parametrize("suffix", WRITERS)
def test_flat_files(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"rows.{suffix}")
    expected = [(f"rows.{suffix} row {number}", row) for number, row in enumerate(AS_READ[suffix], start=1)]
    assert read(tmp_path) == expected
    assert read(tmp_path, rows=2) == expected[:2]
    assert read(tmp_path, rows=9) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row for _, row in read(tmp_path)] == AS_READ[suffix]


def test_several_files_are_read_in_order_and_hidden_ones_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    (tmp_path / ".hidden").write_text("not rows")
    assert [where for where, _ in read(tmp_path)] == ["a.jsonl row 1", "a.jsonl row 2", "b.jsonl row 1"]
    assert [where for where, _ in read(tmp_path, rows=1)] == ["a.jsonl row 1"]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"a": 1}\n  \n{"a": 2}\n\n')
    assert read(tmp_path) == [("rows.jsonl row 1", {"a": 1}), ("rows.jsonl row 2", {"a": 2})]


def test_an_empty_folder_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path) == []


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "a line that is not JSON": ("rows.jsonl", '{"a": 1}\n\n{"a": 2\n', "rows.jsonl line 3: not JSON (Expecting ',' delimiter"),
    "a line that is a list": (
        "rows.jsonl",
        '{"a": 1}\n[1]\n',
        "rows.jsonl line 2: a row must be a JSON object",
    ),
    "a line that is null": ("rows.jsonl", "null\n", "rows.jsonl line 1: a row must be a JSON object, this is a NoneType"),
    "a file that is not JSON": ("rows.json", "[{]", "rows.json: not JSON ("),
    "a file that is an object": ("rows.json", '{"a": 1}', "rows.json: must be a list of objects"),
    "a file that is a list of numbers": ("rows.json", '[{"a": 1}, 2]', "rows.json: must be a list of objects"),
    "too many values": ("rows.csv", "a,b\n1,2\n3,4,5\n", "rows.csv line 3: has more values than the header has columns"),
    "a CSV field without end": ("rows.csv", "a\n1\n" + "2" * 200_000, "rows.csv: cannot be read after row 1: field larger"),
    "no UTF-8": ("rows.jsonl", '{"a": "é"}\n'.encode("latin-1"), "rows.jsonl: cannot be read after row 0: 'utf-8' codec"),
    "no gzip": ("rows.jsonl.gz", '{"a": 1}\n', "rows.jsonl.gz: cannot be read after row 0: Not a gzipped file"),
    "gzip cut short": ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-9], "rows.jsonl.gz: cannot be read after row "),
    "gzip of another kind": ("rows.txt.gz", gzip.compress(b"a"), "rows.txt.gz: cannot read rows from a .txt.gz; use one of"),
    "no Parquet": ("rows.parquet", "PAR1", "rows.parquet: not a readable Parquet file"),
    "an unknown suffix": (
        "notes.txt",
        "a",
        "notes.txt: cannot read rows from a .txt; use one of .jsonl, .jsonl.gz, .json, .csv",
    ),
    "no suffix": ("LICENSE", "MIT", "LICENSE: cannot read rows from a file without suffix; use one of"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_an_unreadable_source_is_an_input_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path)


def test_rows_before_a_bad_line_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnot JSON\n')
    assert read(tmp_path, rows=1) == [("rows.jsonl row 1", {"a": 1})]


@pytest.mark.parametrize("name", PROCEDURAL)
def test_procedural(tmp_path: Path, name: str) -> None:
    (tmp_path / "procedural.json").write_text(json.dumps({"name": name, "version": 1}))
    rows = read(tmp_path, rows=5, seed=3)
    assert rows == [(f"procedural:{name} row {number}", row) for number, row in enumerate(PROCEDURAL[name].rows(5, 3), start=1)]
    assert len(rows) == 5
    assert read(tmp_path, rows=5, seed=4) != rows
    with pytest.raises(InputError, match=f"procedural:{name} makes as many rows as it is asked for: set `rows`"):
        read(tmp_path)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder as the hub's clone of a dataset is."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_hub_clone(hub: Path, suffix: str) -> None:
    WRITERS[suffix](hub / f"data.{suffix}")
    expected = [(f"clone/train row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert read(hub) == expected
    assert read(hub, rows=2) == expected[:2]


def test_hub_clone_of_several_configs_and_splits(hub: Path) -> None:
    files = {name: f"{name}.jsonl" for name in ("main-train", "main-test", "socratic-train")}
    for number, file in enumerate(files.values()):
        write_jsonl(hub / file, [{"n": number}])
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main-train.jsonl}\n"
        "  - {split: test, path: main-test.jsonl}\n- config_name: socratic\n  data_files: socratic-train.jsonl\n---\n"
    )
    assert read(hub, config="main") == [("clone/train row 1", {"n": 0})]
    assert read(hub, config="main", split="test") == [("clone/test row 1", {"n": 1})]
    assert read(hub, config="socratic") == [("clone/train row 1", {"n": 2})]
    for wrong, message in (
        ({"config": "other"}, "clone/train: cannot be read after row 0: BuilderConfig 'other' not found"),
        ({"config": "main", "split": "other"}, "clone/other: cannot be read after row 0: Bad split: other"),
        ({}, "Config name is missing"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            read(hub, **wrong)


def test_hub_clone_whose_parts_are_folders(hub: Path) -> None:
    """As Anthropic/hh-rlhf is: no configs declared, gzipped files, one part of other columns."""
    for number, (part, split) in enumerate([("harmless", "train"), ("harmless", "test"), ("helpful", "train")]):
        (hub / part).mkdir(exist_ok=True)
        (hub / part / f"{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"n": number}).encode()))
    (hub / "red-team").mkdir()
    (hub / "red-team" / "red.jsonl.gz").write_bytes(gzip.compress(b'{"rating": 1}'))
    assert read(hub, config="harmless") == [("clone/train row 1", {"n": 0})]
    assert read(hub, config="harmless", split="test") == [("clone/test row 1", {"n": 1})]
    assert read(hub, config="helpful") == [("clone/train row 1", {"n": 2})]
    with pytest.raises(InputError, match="BuilderConfig 'other' not found"):
        read(hub, config="other")


def test_a_declared_config_wins_over_a_folder_of_its_name(hub: Path) -> None:
    (hub / "main").mkdir()
    write_jsonl(hub / "main" / "train.jsonl", [{"n": 1}])
    write_jsonl(hub / "declared.jsonl", [{"n": 2}])
    (hub / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: declared.jsonl\n---\n")
    assert read(hub, config="main") == [("clone/train row 1", {"n": 2})]


def test_hub_clone_without_data_or_with_bad_data(hub: Path) -> None:
    with pytest.raises(InputError, match="clone/train: cannot be read after row 0"):
        read(hub)
    (hub / "data.jsonl").write_text('{"a": 1\n')
    with pytest.raises(InputError, match="clone/train: cannot be read after row 0: JSON parse error"):
        read(hub)
