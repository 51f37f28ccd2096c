"""One owner a key: two processes never both hold it, and it dies with its holder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import ROOT

from tasks import lease as module
from tasks.lease import GPUS, KEPT, LEASE_SECONDS, RENEW_SECONDS, LeaseLostError, forget_old, held, lease, own_gpus

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


class Limits:
    """Prefect's leases of one limit: who has it, and who gave it back."""

    def __init__(self) -> None:
        self.owner: UUID | None = None
        self.released: list[UUID] = []

    def grant(self, key: str) -> UUID | None:
        assert key == "key"
        if self.owner is not None:
            return None
        self.owner = uuid4()
        return self.owner

    @contextmanager
    def client(self) -> Iterator[Any]:
        yield SimpleNamespace(release_concurrency_slots_with_lease=self.release)

    def release(self, lease_id: UUID) -> None:
        self.released.append(lease_id)
        self.owner = None if lease_id == self.owner else self.owner


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    made = Limits()
    monkeypatch.setattr(module, "server", lambda: "http://somewhere")
    monkeypatch.setattr(module, "_granted", made.grant)
    monkeypatch.setattr(module, "_client", made.client)
    return made


def test_a_lease_is_recorded_while_it_is_held(tmp_path: Path, limits: Limits) -> None:
    with lease(tmp_path, "key"):
        [record] = tmp_path.glob("*.lease")
        owner = limits.owner
        assert record.read_text() == str(owner)
    assert (limits.released, limits.owner, record.exists()) == ([owner], None, False)


@pytest.mark.parametrize(
    ("record", "age", "waits"),
    [
        ("the owner", 0, False),
        ("the owner", LEASE_SECONDS - RENEW_SECONDS - 1, False),
        # Over soon, or already: the server frees it, and perhaps just now for another machine.
        ("the owner", LEASE_SECONDS - RENEW_SECONDS + 1, True),
        (str(UUID(int=1)), 0, True),
        ("", 0, True),
        (None, 0, True),
    ],
)
def test_the_lease_of_a_process_of_this_machine_that_is_gone(
    tmp_path: Path, limits: Limits, record: str | None, age: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = limits.grant("key")
    file = tmp_path / "key.lease"
    if record is not None:
        file.write_text(str(dead) if record == "the owner" else record)
        os.utime(file, (time.time() - age, time.time() - age))

    def over(_: float) -> None:
        assert limits.owner == dead
        limits.owner = None

    monkeypatch.setattr(module.time, "sleep", over)
    told: list[str] = []
    with lease(tmp_path, "key", told.append):
        assert bool(told) == waits
        assert limits.owner not in (None, dead)
        assert file.read_text() == str(limits.owner)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not answer renewals, and the lease is over at once."""
    monkeypatch.setattr(module._Renewed, "_renew", lambda _: False)
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.0)


def test_a_lease_that_ended_while_the_server_was_away_is_taken_again(tmp_path: Path, limits: Limits, away: None) -> None:
    with lease(tmp_path, "key") as held:
        limits.owner = None
        assert not held.check(), "somebody else may have had it"
        owner = limits.owner
        assert owner is not None
        assert (tmp_path / "key.lease").read_text() == str(owner)
    assert limits.released == [owner]


def test_a_lease_that_is_another_s_by_now_is_lost(tmp_path: Path, limits: Limits, away: None) -> None:
    with lease(tmp_path, "key") as held:
        other = limits.owner = uuid4()
        with pytest.raises(LeaseLostError, match="another machine computes the same by now"):
            held.check()
    assert limits.owner == other


def test_a_lease_that_is_renewed_is_ours_all_the_time(tmp_path: Path, limits: Limits) -> None:
    with lease(tmp_path, "key") as held:
        assert held.check()
    assert not (tmp_path / "key.lease").exists()
