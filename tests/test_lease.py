"""One owner a key: two processes never both hold it, and it dies with its holder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from conftest import ROOT

from tasks.lease import held, lease

HOLDER = (
    "import sys, time\nfrom pathlib import Path\nfrom tasks.lease import lease\n"
    "with lease(Path(sys.argv[1]), 'key'):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "held"
    return child


def test_second_process_waits_until_the_first_is_killed(tmp_path: Path) -> None:
    child = holder(tmp_path)
    assert held(tmp_path, "key")
    owners: list[str] = []
    timer = threading.Timer(0.8, os.kill, (child.pid, signal.SIGKILL))
    timer.start()
    with lease(tmp_path, "key", owners.append):
        assert child.wait(10) == -signal.SIGKILL
    assert [json.loads(owner)["pid"] for owner in owners] == [child.pid]


def test_free_after_its_block(tmp_path: Path) -> None:
    assert not held(tmp_path, "key")
    with lease(tmp_path, "key"):
        assert held(tmp_path, "key")
    assert not held(tmp_path, "key")


def test_other_keys_are_free(tmp_path: Path) -> None:
    with lease(tmp_path, "one"), lease(tmp_path, "two"):
        assert held(tmp_path, "one")
        assert held(tmp_path, "two")
