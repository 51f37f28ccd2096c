"""Which flow runs of a machine have a process, and how those that are left are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from flows.processes import known, recorded, stop_left

Start = Callable[..., subprocess.Popen[str]]

RUN = """
import os, signal, sys, time
from pathlib import Path
from flows.processes import recorded

if sys.argv[3] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with recorded(Path(sys.argv[1]), sys.argv[2]):
    if sys.argv[3] == "forks" and os.fork() == 0:
        time.sleep(60)
    print("recorded", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    made: list[subprocess.Popen[str]] = []

    def start(flow_run: str, how: str = "plainly") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path), flow_run, how]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        made.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "recorded\n"
        return child

    yield start
    for child in made:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        child.wait()


def told(root: Path) -> dict[str, bool]:
    return {one.flow_run: one.alive for one in known(root)}


def test_a_process_is_known_as_long_as_its_block(tmp_path: Path) -> None:
    assert known(tmp_path) == []
    with recorded(tmp_path, "a"):
        [one] = known(tmp_path)
        assert (one.pid, one.flow_run, one.alive) == (os.getpid(), "a", True)
    assert known(tmp_path) == []


@pytest.mark.parametrize("how", ["plainly", "forks"])
def test_one_that_was_killed_is_known_as_gone(tmp_path: Path, run: Start, how: str) -> None:
    """Also when a child of it has its lock still."""
    child, other = run("a", how), run("b")
    assert told(tmp_path) == {"a": True, "b": True}
    child.kill()
    child.wait()
    assert told(tmp_path) == {"a": False, "b": True}
    other.terminate()


def test_those_that_are_left_are_stopped(tmp_path: Path, run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.processes.STOP_SECONDS", 1.0)
    children = [run("a"), run("b", "stubborn")]
    assert stop_left(tmp_path) == 2
    assert [child.wait(10) for child in children] == [-signal.SIGTERM, -signal.SIGKILL]
    assert told(tmp_path) == {"a": False, "b": False}
    assert stop_left(tmp_path) == 0
