"""Resumed sampling: the same bytes whenever the stage dies, and nothing drawn twice that a state holds."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sampling
import torch
from conftest import ROOT, request_for
from sampling import (
    COLUMNS,
    CrashError,
    Make,
    Rows,
    config,
    crash_at,
    digest,
    events,
    long_row,
    metrics,
    only,
    samples,
)

import stages.data.parts
import stages.sample
from stages.data.parquet import read_rows, write_rows
from stages.request import run_stage
from stages.run import Event, Run

threads = sampling.threads
rows = sampling.rows
prompts = sampling.prompts
drawn = sampling.drawn
whole = sampling.whole


@pytest.mark.parametrize("saved", [1, 2, 3, 4, 5])
def test_a_run_that_fails_after_any_state_draws_the_rest_alone(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str], saved: int
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", saved))
    assert drawn == [row["id"] for row in rows[: 2 * saved]]
    torch.manual_seed(1234)
    resumed = run_stage(request)
    assert drawn == [row["id"] for row in rows]
    assert [event["step"] for event in events(resumed.folder, "state")] == [2, 4, 6, 8, 10]
    assert digest(resumed) == digest(whole)
    assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize(
    ("kind", "number", "again"), [("progress", 4, 2), ("progress", 6, 1), ("metrics", 1, 1), ("table", 1, 1)]
)
def test_a_run_that_fails_elsewhere_draws_again_only_what_no_state_holds(
    init_folder: Path,
    rows: Rows,
    prompts: Path,
    tmp_path: Path,
    whole: Run,
    drawn: list[str],
    kind: str,
    number: int,
    again: int,
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at(kind, number))
    first = len(drawn)
    resumed = run_stage(request)
    assert drawn[first:] == [row["id"] for row in rows[first - again :]]
    assert digest(resumed) == digest(whole)


def test_a_state_that_was_half_written_is_made_again(
    init_folder: Path, prompts: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)

    def fail(*arguments: Any, **named: Any) -> int:
        write_rows(*arguments, **named)
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(stages.data.parts, "write_rows", fail)
        with pytest.raises(CrashError):
            run_stage(request)
    # And once with a state before it.
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 2))
    with monkeypatch.context() as patch:
        patch.setattr(stages.data.parts, "write_rows", fail)
        with pytest.raises(CrashError):
            run_stage(request)
    assert [path.name for path in sorted((request.folder / "state").iterdir())] == [".draft-00000006", "step-00000004"]
    assert digest(run_stage(request)) == digest(whole)


def test_a_run_may_go_on_with_other_batches(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str]
) -> None:
    """All of `runtime` may change between two tries, but for the threads: they are those of the first."""
    folder = tmp_path / "broken"
    uses = [({}, 1), ({"generation_batch": 9, "save_every": 2, "threads": 2}, 1), ({"generation_batch": 1, "threads": 2}, None)]
    for use, crash in uses:
        request = request_for("sample", folder, config(runtime=use), policy=init_folder, prompts=prompts)
        if crash is None:
            assert digest(run_stage(request)) == digest(whole)
            continue
        with pytest.raises(CrashError):
            run_stage(request, crash_at("state", crash))
    assert torch.get_num_threads() == 1
    # After 2 prompts, then after 2 batches of 3 more, then one by one.
    assert [event["step"] for event in events(folder, "state")] == [2, 8, 9, 10]
    assert drawn == [row["id"] for row in rows]


def test_parts_are_linked_from_state_to_state(init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path) -> None:
    """A part is written once: a later state links it, and holds what was drawn since beside it."""
    states: list[dict[str, int]] = []

    def listen(event: Event) -> None:
        if event["event"] == "state":
            [state] = (tmp_path / "run" / "state").iterdir()
            parts = sorted(state.glob("*/*.parquet"))
            states.append({f"{part.parent.name}/{part.name}": part.stat().st_ino for part in parts})
            held = [row["id"] for part in parts for row in read_rows(part)]
            assert held == [row["id"] for row in rows[: event["step"]] for _ in range(3)]
            assert {part.stat().st_nlink for part in parts} == {1}, "the state before is gone"

    run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts), listen)
    assert [len(state) for state in states] == [1, 2, 3, 4, 5]
    for before, after in pairwise(states):
        assert before.items() < after.items()


def test_dropped_prompts_are_remembered(init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path, drawn: list[str]) -> None:
    """Batches without any sample make states too: without a part, and with their count."""
    given = [long_row(128), long_row(130), long_row(132), *rows[:2], long_row(134)]
    prompts = dataset(given, "prompts")
    request = request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 1))
    assert list((request.folder / "state").rglob("*.parquet")) == []
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 1))
    run = run_stage(request)
    assert drawn == [row["id"] for row in given]
    assert metrics(run)["prompts_dropped"] == 4
    assert [r["id"] for r in samples(run)] == [row["id"] for row in rows[:2] for _ in range(3)]


def test_a_last_batch_without_samples_keeps_those_before(init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path) -> None:
    prompts = dataset([*rows[:2], long_row(128)], "prompts")
    run = run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts))
    assert [event["step"] for event in events(run.folder, "state")] == [2]
    assert metrics(run) | {"length": 0, "truncated": 0} == {"samples": 6, "prompts_dropped": 1, "length": 0, "truncated": 0}


def test_outputs_that_a_kill_left_half_written_are_made_again(
    init_folder: Path, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str]
) -> None:
    expected = digest(whole)
    (whole.folder / "outputs.json").unlink()
    path = whole.folder / "outputs" / "samples" / "data.parquet"
    path.write_bytes(path.read_bytes()[:100])
    (path.parent / "left over.parquet").write_text("by the killed try")
    request = request_for("sample", whole.folder, config(), policy=init_folder, prompts=prompts)
    assert digest(run_stage(request)) == expected
    assert len(drawn) == 1
    assert (whole.folder / "outputs.json").is_file()


def test_a_killed_child_resumes_to_the_same_bytes(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, drawn: list[str]
) -> None:
    chosen = config(sampling={"max_new_tokens": 20}, runtime={"generation_batch": 3})
    rows = [only(row, *COLUMNS) for row in chain_rows]
    inputs = {"policy": init_folder, "prompts": dataset(rows, "prompts")}
    expected = run_stage(request_for("sample", tmp_path / "whole", chosen, **inputs))
    request = request_for("sample", tmp_path / "killed", chosen, **inputs)
    request.folder.mkdir()
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json())

    with subprocess.Popen([sys.executable, "-m", "stages", str(file)], cwd=ROOT) as child:
        deadline = time.monotonic() + 120
        while len(events(request.folder, "state")) < 5 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
    assert child.returncode == -9
    saved = max(int(path.name[5:13]) for path in (request.folder / "state").glob("step-*"))
    assert 5 <= saved < 48
    assert not (request.folder / "outputs.json").exists()

    drawn.clear()
    resumed = run_stage(request)
    # Nothing that the child had saved is drawn again, and nothing is left out.
    assert drawn == [row["id"] for row in rows[saved:]]
    assert digest(resumed) == digest(expected)
    assert metrics(resumed) == metrics(expected)
