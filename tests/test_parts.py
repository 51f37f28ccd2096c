"""Rows made over many steps: each is written once, and all come back in order from any state."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.parquet import read_rows, read_schema, write_rows
from stages.data.parts import Parts
from stages.run import Run

Rows = list[dict[str, Any]]


def numbered(start: int, count: int) -> Rows:
    return [{"id": f"{number}", "number": number} for number in range(start, start + count)]


def save(run: Run, parts: Parts, step: int) -> Path:
    with run.new_state(step) as folder:
        parts.save(folder)
    found = run.load_state()
    assert found is not None
    return found


def files(state: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was written again."""
    return {path.relative_to(state).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in state.glob("*/*")}


@settings(max_examples=15, deadline=None)
@given(actions=st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["save", "crash"])), max_size=12))
def test_rows_come_back_in_order_over_states_and_resumes(actions: list[Any]) -> None:
    with TemporaryDirectory() as name:
        run, saved, recent = Run(Path(name), {}), [], []
        parts = Parts(run, {})
        for step, action in enumerate(actions):
            if action == "save":
                save(run, parts, step)
                saved, recent = saved + recent, []
            elif action == "crash":
                run, recent = Run(Path(name), {}), []
                parts = Parts(run, {})
            else:
                rows = numbered(len(saved) + len(recent), action)
                parts.add(rows)
                recent += rows
            assert list(parts.rows()) == saved + recent
            assert list(parts.rows()) == saved + recent, "reading takes nothing away"


def test_what_a_state_holds_is_linked_by_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    parts = Parts(run, {})
    parts.add(numbered(0, 3))
    first = files(save(run, parts, 1))
    assert list(first) == ["part-000000/data.parquet"]
    parts.add(numbered(3, 2))
    second = files(save(run, parts, 2))
    assert sorted(second) == ["part-000000/data.parquet", "part-000001/data.parquet"]
    assert first.items() <= second.items()
    # A second state of one step, and a resume.
    parts = Parts(Run(run.folder, {}), {})
    parts.add(numbered(5, 1))
    third = files(save(run, parts, 2))
    assert second.items() < third.items()
    assert [row["number"] for row in parts.rows()] == [0, 1, 2, 3, 4, 5]
    state = run.load_state()
    assert state is not None
    assert {path.stat().st_nlink for path in state.glob("*/*")} == {1}, "the earlier states are gone"


def test_many_parts_stay_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    parts = Parts(run, {})
    for step in range(12):
        parts.add(numbered(step, 1))
        save(run, parts, step)
    assert [row["number"] for row in parts.rows()] == list(range(12))


@pytest.mark.parametrize("before", [0, 2])
def test_nothing_new_to_write_is_fine(tmp_path: Path, before: int) -> None:
    run = Run(tmp_path / "run", {})
    parts = Parts(run, {})
    assert list(parts.rows()) == []
    if before:
        parts.add(numbered(0, before))
        save(run, parts, 1)
    state = save(run, parts, 2)
    assert len(files(state)) == (before > 0)
    parts.add([])
    assert files(save(run, parts, 3)) == files(save(run, parts, 4))
    assert list(parts.rows()) == numbered(0, before)
    parts.add(numbered(before, 1))
    assert list(parts.rows()) == numbered(0, before + 1)


def test_columns_that_are_null_for_long_have_their_types_in_every_part(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    types = {"score": pa.float64(), "tags": pa.list_(pa.string())}
    parts = Parts(run, types)
    written: Rows = [{"id": "a", "score": None, "tags": None}, {"id": "b", "score": 0.5, "tags": ["x"]}]
    for step, row in enumerate(written):
        parts.add([row])
        state = save(run, parts, step)
        for part in state.glob("part-*"):
            schema = read_schema(part)
            assert {name: schema.field(name).type for name in types} == types
    assert list(parts.rows()) == written
    whole = tmp_path / "whole"
    whole.mkdir()
    assert write_rows(whole, parts.rows(), types=parts.types) == 2
    assert list(read_rows(whole)) == written


def test_rows_added_later_do_not_reach_back(tmp_path: Path) -> None:
    """A state is what it was when it was saved, and the caller's list is its own."""
    run = Run(tmp_path / "run", {})
    parts, rows = Parts(run, {}), numbered(0, 1)
    parts.add(rows)
    state = save(run, parts, 1)
    parts.add(numbered(1, 1))
    assert rows == numbered(0, 1)
    assert [row for part in state.glob("part-*") for row in read_rows(part)] == numbered(0, 1)
