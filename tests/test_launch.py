"""Stages in this process and in child processes: the same events, the same errors, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, request_for

from stages.errors import InputError
from stages.request import Request
from stages.run import Event
from tasks.launch import Launch, command, launch

MODES = ["in_process", "process"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "procedural.json").write_text(json.dumps({"name": "chain-sum/prompts"}))
    return folder


def prepare_request(folder: Path, source: Path, rows: int = 5) -> Request:
    folder.mkdir(exist_ok=True)
    return request_for("prepare", folder, {"rows": rows}, source=source)


def test_both_modes_tell_the_same(tmp_path: Path, source: Path) -> None:
    told: dict[str, list[Event]] = {}
    for mode in MODES:
        events: list[Event] = []
        launch(prepare_request(tmp_path / mode, source), Launch.model_validate({"mode": mode}), events.append)
        told[mode] = events
    assert told["in_process"] == told["process"]
    assert told["process"][-1] == {"event": "done"}


@pytest.mark.parametrize("mode", MODES)
def test_input_errors_arrive_as_input_errors(tmp_path: Path, mode: str) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    (source / "rows.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(InputError, match=r'rows\.jsonl row 1: "prompt" is empty'):
        launch(prepare_request(tmp_path / "run", source), Launch.model_validate({"mode": mode}), lambda _: None)


def test_a_child_that_dies_is_told_with_its_last_lines(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr("tasks.launch.command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"ended with -9(.|\n)*last words"):
        launch(prepare_request(tmp_path / "run", source), Launch(mode="process"), lambda _: None)


def test_events_of_an_earlier_try_are_not_told_again(tmp_path: Path, source: Path) -> None:
    request = prepare_request(tmp_path / "run", source)
    (request.folder / "events.jsonl").write_text('{"event": "message", "text": "old"}\n')
    events: list[Event] = []
    launch(request, Launch(mode="process"), events.append)
    assert {"event": "message", "text": "old"} not in events


def test_command_lines(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    assert command(file, Launch())[1:] == ["-m", "stages", str(file)]
    assert command(file, Launch(processes=2))[-5:] == ["--nproc_per_node", "2", "-m", "stages", str(file)]
    assert "--config_file" in command(file, Launch(accelerate_config="fsdp.yaml"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\nfrom tasks.launch import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert ends(child)


def ends(pid: int, seconds: float = 10) -> bool:
    """Whether a process is gone, or a zombie that nobody reaps, within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_only_distributed_stages_get_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    assert command(file, Launch(processes=2), distributed=False)[1:] == ["-m", "stages", str(file)]


def test_an_input_error_arrives_through_torchrun(tmp_path: Path) -> None:
    """torchrun ends with 1 and a report of its own; the one line that a person needs is found all the same."""
    inputs = {"model": tmp_path / "none", "train": tmp_path / "none"}
    for folder in (tmp_path / "none", tmp_path / "run"):
        folder.mkdir()
    request = request_for("sft", tmp_path / "run", {"runtime": {"device": "cpu"}}, **inputs)
    with pytest.raises(InputError, match="none: no model there"):
        launch(request, Launch(mode="process", processes=2), lambda _: None)
