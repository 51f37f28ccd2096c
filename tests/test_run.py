"""A run's folder: events, resume states that are whole or absent, outputs declared last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import request_for

from stages.data.parquet import write_rows
from stages.errors import InputError
from stages.request import run_stage
from stages.run import Run

OUTPUTS: dict[str, Any] = {"made": "dataset", "spare": "model"}


def events(folder: Path) -> list[dict[str, Any]]:
    """The events file, as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "events.jsonl").read_text().splitlines()]


def save(run: Run, step: int, text: str, barrier: Callable[[], None] = lambda: None) -> None:
    with run.new_state(step, barrier) as folder:
        (folder / "weights").write_text(text)


def loaded(run: Run) -> tuple[str, str] | None:
    folder = run.load_state()
    return None if folder is None else (folder.name, (folder / "weights").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", OUTPUTS, key="the key", rank=0)


def test_only_the_newest_state_is_kept(run: Run) -> None:
    assert loaded(run) is None
    for step in (5, 10, 200):
        save(run, step, f"after {step}")
        assert loaded(run) == (f"step-{step:08d}", f"after {step}")
        assert [path.name for path in (run.folder / "state").iterdir()] == [f"step-{step:08d}"]
    assert events(run.folder) == [{"event": "state", "step": step} for step in (5, 10, 200)]


def test_an_exception_inside_leaves_the_old_state(run: Run) -> None:
    save(run, 1, "old")

    def killed() -> None:
        with run.new_state(2) as folder:
            (folder / "weights").write_text("half")
            (folder / "left over").write_text("of the try that was killed")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert loaded(run) == ("step-00000001", "old")
    assert events(run.folder) == [{"event": "state", "step": 1}]

    again = Run(run.folder, OUTPUTS, rank=0)
    assert loaded(again) == ("step-00000001", "old")
    save(again, 2, "new")
    assert loaded(again) == ("step-00000002", "new")
    assert [path.name for path in (run.folder / "state").rglob("*")] == ["step-00000002", "weights"]


def test_a_crash_at_the_rename_leaves_the_old_state(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1, "old")

    def crash(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="power cut"):
        save(run, 2, "new")
    assert loaded(run) == ("step-00000001", "old")


def test_a_crash_while_the_old_state_is_removed_leaves_the_new_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1, "old")

    def crash(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "step-00000001":
            raise OSError("power cut")

    monkeypatch.setattr("stages.run.shutil.rmtree", crash)
    with pytest.raises(OSError, match="power cut"):
        save(run, 2, "new")
    assert loaded(run) == ("step-00000002", "new")


def test_files_reach_the_disk_before_they_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("stages.run.os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))

    def all_synced(folder: Path) -> bool:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return len(files) == 1 and {path.stat().st_ino for path in files} <= set(synced)

    checked: list[bool] = []
    rename, replace = Path.rename, Path.replace
    monkeypatch.setattr(Path, "rename", lambda path, to: (checked.append(all_synced(path)), rename(path, to))[1])
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (checked.append(all_synced(run.folder / "outputs")), replace(path, to))[1]
    )
    save(run, 1, "x")
    (run.output("made") / "data").write_text("rows")
    run.done()
    assert checked == [True, True]


def test_ranks_wait_until_the_draft_is_there_is_written_and_is_the_state(run: Run) -> None:
    seen: list[list[str]] = []
    save(run, 7, "x", lambda: seen.append(sorted(path.name for path in (run.folder / "state").rglob("*"))))
    assert seen == [[".draft-00000007"], [".draft-00000007", "weights"], ["step-00000007", "weights"]]


def test_output_clears_what_an_earlier_try_left(run: Run) -> None:
    folder = run.output("made")
    (folder / "inner").mkdir()
    (folder / "inner" / "old").write_text("old")
    assert run.output("made") == folder == run.folder / "outputs" / "made"
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyError, match="spare"):
        run.output("unheard-of")


def test_outputs_json_is_last_and_names_what_was_made(tmp_path: Path) -> None:
    heard: list[tuple[str, bool]] = []
    folder = tmp_path / "run"
    run = Run(folder, OUTPUTS, "the key", lambda event: heard.append((event["event"], (folder / "outputs.json").exists())), 0)
    (run.output("made") / "data").write_text("rows")
    run.output("spare")
    run.log(1, {"loss": 2})
    run.message("nearly")
    run.done()
    assert heard == [("metrics", False), ("message", False), ("done", True)]
    assert json.loads((folder / "outputs.json").read_text()) == {"key": "the key", "outputs": {"made": "dataset"}}
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "outputs", "outputs.json", "work"]


def test_events_are_in_the_file_and_with_the_listener_alike(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    run = Run(tmp_path / "run", OUTPUTS, listener=heard.append, rank=0)
    run.log(3, {"loss": 1.5, "kl": 2})
    run.progress(3, 10, "loss 1.500")
    run.table("rows", [{"what": "é", "rows": 2}])
    run.message("text")
    expected = [
        {"event": "metrics", "step": 3, "metrics": {"loss": 1.5, "kl": 2.0}},
        {"event": "progress", "done": 3, "total": 10, "note": "loss 1.500"},
        {"event": "table", "name": "rows", "rows": [{"what": "é", "rows": 2}]},
        {"event": "message", "text": "text"},
    ]
    assert heard == expected
    assert events(run.folder) == expected
    Run(run.folder, OUTPUTS, rank=0).message("of a second try")
    assert events(run.folder) == [*expected, {"event": "message", "text": "of a second try"}]


def test_numbers_that_are_not_finite_become_null(run: Run) -> None:
    bad = {"nan": math.nan, "up": math.inf, "down": -math.inf}
    run.log(1, bad | {"good": 0.1})
    run.table("t", [bad | {"what": "text"}])
    null = dict.fromkeys(bad)
    assert events(run.folder) == [
        {"event": "metrics", "step": 1, "metrics": null | {"good": 0.1}},
        {"event": "table", "name": "t", "rows": [null | {"what": "text"}]},
    ]


def test_rank_1_writes_nothing(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    run = Run(tmp_path / "run", OUTPUTS, key="k", listener=heard.append, rank=1)
    run.log(1, {"loss": 1.0})
    run.progress(1, 2)
    run.table("t", [{"a": 1}])
    run.message("m")
    run.output("made")
    barriers: list[int] = []
    with run.new_state(4, lambda: barriers.append(1)):
        pass
    run.done()
    assert heard == []
    assert len(barriers) == 3
    assert [path.name for path in run.folder.rglob("*")] == ["work"]


def test_rank_1_leaves_what_rank_0_wrote(run: Run) -> None:
    (run.output("made") / "data").write_text("rows")
    save(run, 3, "state")
    second = Run(run.folder, OUTPUTS, rank=1)
    assert (second.output("made") / "data").read_text() == "rows"
    assert loaded(second) == ("step-00000003", "state")


def test_rank_comes_from_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert Run(tmp_path, OUTPUTS).rank == 3
    monkeypatch.delenv("RANK")
    assert Run(tmp_path, OUTPUTS).rank == 0


def test_rows_are_streamed_from_a_dataset(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows", [{"n": 1}, {"n": 2}])
    assert list(run.rows(tmp_path / "rows")) == [{"n": 1}, {"n": 2}]


def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return tmp_path / "source"


def test_a_stage_that_raises_declares_no_outputs(tmp_path: Path) -> None:
    request = request_for("prepare", tmp_path / "run", {"columns": {"prompt": "question"}}, source=source(tmp_path))
    with pytest.raises(InputError, match="question"):
        run_stage(request)
    assert not (tmp_path / "run" / "outputs.json").exists()


def test_a_stage_runs_under_the_key_it_was_asked_for(tmp_path: Path) -> None:
    request = request_for("prepare", tmp_path / "run", {}, source=source(tmp_path))
    heard: list[dict[str, Any]] = []
    assert run_stage(request, heard.append).key == request.key
    declared = json.loads((tmp_path / "run" / "outputs.json").read_text())
    assert declared == {"key": request.key, "outputs": {"train": "dataset"}}
    assert heard == events(tmp_path / "run")
    assert heard[-1] == {"event": "done"}


def test_another_key_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    request = request_for("prepare", tmp_path / "run", {}, source=source(tmp_path))
    with pytest.raises(InputError, match="run different versions of posttrain"):
        run_stage(request.model_copy(update={"key": "0" * 64}))
    with pytest.raises(InputError, match="no stage is named 'bake'"):
        run_stage(request.model_copy(update={"stage": "bake"}))
    assert not (tmp_path / "run").exists()


def test_a_second_state_of_one_step_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    for text in ("first", "second", "third"):
        with run.new_state(4) as folder:
            (folder / "x").write_text(text)
    state = run.load_state()
    assert state is not None
    assert (state / "x").read_text() == "third"
    assert len(list((tmp_path / "state").iterdir())) == 1
