"""One owner a key: two processes never both hold it, and it dies with its holder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from tasks import lease as module
from tasks.lease import GPUS, KEPT, forget_old, held, lease, own_gpus

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


def test_limits_that_nobody_has_asked_for_in_a_day_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that somebody holds, has asked for since, or has made for another purpose."""
    monkeypatch.setattr(module, "PAGE", 2)
    now = datetime(2026, 1, 3, tzinfo=UTC)
    old, new = now - KEPT - timedelta(seconds=1), now - KEPT + timedelta(seconds=1)
    limits = {"a": (0, old), "b": (1, old), "c": (0, new), "d": (0, old)}
    rows = [SimpleNamespace(name=f"posttrain-{key}", active_slots=slots, updated=then) for key, (slots, then) in limits.items()]
    rows.insert(1, SimpleNamespace(name="other", active_slots=0, updated=old))
    deleted: list[str] = []
    client: Any = SimpleNamespace(
        read_global_concurrency_limits=lambda limit, offset=0: rows[offset : offset + limit],
        delete_global_concurrency_limit_by_name=deleted.append,
    )
    assert forget_old(client, now) == 2
    assert deleted == ["posttrain-a", "posttrain-d"]


def test_steps_of_one_set_of_gpus_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS, "0,1")
    owners: list[str] = []
    with own_gpus(tmp_path):
        monkeypatch.setenv(GPUS, "2")
        with own_gpus(tmp_path, owners.append):
            assert owners == [], "other GPUs are free"
        monkeypatch.delenv(GPUS)
        with own_gpus(tmp_path, owners.append):
            assert owners == [], "a worker that gives none"
        monkeypatch.setenv(GPUS, "0,1")

        def wait() -> None:
            with own_gpus(tmp_path, owners.append):
                owners.append("began")

        other = threading.Thread(target=wait)
        other.start()
        while not owners:
            time.sleep(0.01)
        assert [json.loads(owner)["pid"] for owner in owners] == [os.getpid()]
    other.join(10)
    assert owners[1:] == ["began"]
