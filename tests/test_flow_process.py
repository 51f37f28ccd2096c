"""What becomes of a flow run's process when its worker dies. With Prefect itself it is in tests/slow/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# A flow run, whose cancellation somebody wants from the beginning, and its worker.
RUN = """
import signal, sys, time
from pathlib import Path
from flows import flow_process

def end(number, frame):
    raise SystemExit

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, end)
flow_process.POLL_SECONDS = 0.05
flow_process._cancelling = lambda flow_run: flow_run == "a run" and (folder / "wanted").exists()
flow_process._cancel = lambda flow_run: (folder / "cancelled").write_text(flow_run)
flow_process.write_to(str(folder / "log"))
print("it begins", flush=True)
with flow_process.cancelled_without_worker("a run"):
    while not (folder / "over").exists():
        time.sleep(0.05)
print("it ends by itself", flush=True)
"""
WORKER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{RUN}''', sys.argv[1]], stdout=subprocess.PIPE)"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], cwd=ROOT)
    wait_for(tmp_path / "log", "it begins")
    yield made
    # Also when the test has failed nothing goes on.
    (tmp_path / "over").touch()
    made.wait(20)


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{file.name} never said: {text}"
        time.sleep(0.02)


def lose(worker: subprocess.Popen[bytes]) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()


def test_it_goes_on_and_speaks_into_the_worker_s_log(worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    lose(worker)
    time.sleep(0.3)
    (tmp_path / "over").touch()
    wait_for(tmp_path / "log", "it begins\nit ends by itself\n")
    assert not (tmp_path / "cancelled").exists()


def test_it_ends_when_it_is_cancelled(worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    lose(worker)
    (tmp_path / "wanted").touch()
    wait_for(tmp_path / "cancelled", "a run")
    assert (tmp_path / "log").read_text() == "it begins\n"


def test_a_worker_that_lives_cancels_by_itself(worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "wanted").touch()
    time.sleep(0.3)
    (tmp_path / "over").touch()
    assert worker.wait(20) == 0
    assert (tmp_path / "log").read_text() == "it begins\nit ends by itself\n"
    assert not (tmp_path / "cancelled").exists()
