"""Children that are kept alive, and end with the one who keeps them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from flows.children import LONGEST_PAUSE, Child, until_stopped


def child(tmp_path: Path, code: str) -> Child:
    return Child("the child", [sys.executable, "-c", code], {"GIVEN": "yes"}, tmp_path / "logs" / "child.log")


def wait(one: Child) -> int:
    assert one.process is not None
    return one.process.wait(20)


def test_settings_and_output(tmp_path: Path) -> None:
    one = child(tmp_path, "import os; print(os.environ['GIVEN'])")
    for _ in range(2):
        one.start()
        assert wait(one) == 0
    assert one.log.read_text() == "yes\nyes\n", "a new start does not hide why the last one ended"


def test_it_is_started_again_after_a_pause_that_grows(tmp_path: Path) -> None:
    one = child(tmp_path, "raise SystemExit(3)")
    one.start()
    first = one.process
    wait(one)
    assert one.tend() == f"the child ended with 3 and is started again; its log is {one.log}"
    pauses = []
    for _ in range(8):
        assert one.tend() is None, "it is told once"
        pauses.append(one.pause)
        # As if the pause were over.
        one.started = time.monotonic() - one.pause - 0.01
        before = one.process
        assert one.tend() is None
        assert one.process is not before
        wait(one)
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert one.process is not first
    # One that ran for long is told of again.
    one.started = time.monotonic() - 3 * LONGEST_PAUSE
    assert str(one.tend()).startswith("the child ended with 3")
    assert one.pause == 2.0


def test_one_that_runs_is_left_alone_and_stopped(tmp_path: Path) -> None:
    one = child(tmp_path, "import time; time.sleep(60)")
    one.start()
    running = one.process
    assert one.tend() is None
    assert one.process is running
    one.stop()
    assert running is not None
    assert running.returncode == -signal.SIGTERM
    child(tmp_path, "").stop()


def test_signals_end_the_block_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with until_stopped():
            os.kill(os.getpid(), number)
            time.sleep(5)
            raise AssertionError("it went on")
    assert signal.getsignal(signal.SIGTERM) is before
