"""One owner a key at a time.

Here: an operating-system lock, which two processes cannot both hold and which dies with its holder. With a server, also a
leased concurrency limit of Prefect's, so that processes of several machines exclude each other: it is renewed while its block
runs, and one whose holder is gone is free again about a minute later, or when the same machine wants it. `Held.check` says
whether it is still ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from httpx import HTTPError, HTTPStatusError

from tasks.home import server

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POLL_SECONDS = 0.5
# Prefect grants no shorter lease.
LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
# What a worker of `up` sets: its set of GPUs.
GPUS = "POSTTRAIN_GPUS"
OURS = "posttrain-"
KEPT = timedelta(days=1)
PAGE = 200

Waiting = Callable[[str], None]


class LeaseLostError(RuntimeError):
    """Somebody else may compute the same by now."""


class Held:
    """A lease that is held."""

    def check(self) -> bool:
        """Whether it was ours all the time; if not, it is again. Raises LeaseLostError when it is somebody else's now.

        A lock of this machine cannot be lost.
        """
        return True


@contextmanager
def lease(folder: Path, key: str, waiting: Waiting = lambda _: None) -> Iterator[Held]:
    """Hold the key's lease for the length of the block, waiting for another owner to end.

    `waiting` is told once who the owner is.
    """
    with ExitStack() as stack:
        stack.enter_context(lock(folder, key, waiting))
        yield stack.enter_context(served(folder, key, waiting))


@contextmanager
def lock(folder: Path, key: str, waiting: Waiting = lambda _: None) -> Iterator[None]:
    """The same among the processes of this machine alone. The lock file records process, host and start, for people to see."""
    path = _path(folder, key)
    with path.open("a+") as file:
        told = False
        while not _acquire(file.fileno()):
            if not told:
                waiting(path.read_text() or "an unknown owner")
                told = True
            time.sleep(POLL_SECONDS)
        file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        file.write(json.dumps(owner))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


@contextmanager
def own_gpus(folder: Path, waiting: Waiting = lambda _: None) -> Iterator[None]:
    """Have the GPUs to oneself that a worker gives to one step at a time; other workers give none."""
    granted = os.environ.get(GPUS)
    with nullcontext() if granted is None else lock(folder, f"gpus-{granted}".replace("/", "-"), waiting):
        yield


def held(folder: Path, key: str) -> bool:
    """Whether another process holds the key's lease right now."""
    path = _path(folder, key)
    if path.is_file():
        with path.open("a+") as file:
            if not _acquire(file.fileno()):
                return True
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
    return server() is not None and _taken(key)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.lock"


def _acquire(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Renewed(Held):
    """A lease on the server that a thread renews. It is recorded here, with the time of its last renewal as the file's."""

    def __init__(self, key: str, lease_id: UUID, record: Path) -> None:
        self._key, self._record = key, record
        self._have(lease_id)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {lease_id}", daemon=True)
        self._thread.start()

    def check(self) -> bool:
        if time.monotonic() < self._until or self._renew():
            return True
        # The server was away for longer than the lease.
        granted = _granted(self._key)
        if granted is None:
            raise LeaseLostError(
                f"the lease {self.lease_id} could not be renewed in time, and another machine computes the same by now. "
                "Run the step again: what is published already is found"
            )
        self._have(granted)
        return False

    def _have(self, lease_id: UUID) -> None:
        self.lease_id, self._until = lease_id, time.monotonic() + LEASE_SECONDS
        self._record.write_text(str(lease_id))

    def end(self) -> None:
        self._stop.set()
        self._thread.join(RENEW_SECONDS)
        # What cannot be given back now ends by itself; what was computed under it is published already.
        with suppress(HTTPError), _client() as client:
            client.release_concurrency_slots_with_lease(self.lease_id)
            self._record.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> bool:
        """Whether the server still has the lease. While it cannot be asked the lease lives until its time is over."""
        asked = time.monotonic()
        try:
            with _client() as client:
                client.renew_concurrency_lease(self.lease_id, LEASE_SECONDS)
        except HTTPError:
            return False
        self._until = asked + LEASE_SECONDS
        self._record.touch()
        return True


@contextmanager
def served(folder: Path, key: str, waiting: Waiting = lambda _: None) -> Iterator[Held]:
    """The same among machines alone, for who has this machine's lock; without servers there is nobody to wait for."""
    if server() is None:
        yield Held()
        return
    record = _path(folder, key).with_suffix(".lease")
    _give_back(record)
    granted, told = _granted(key), False
    while granted is None:
        if not told:
            waiting("a run of another machine, or one that was killed within the last minute")
            told = True
        time.sleep(POLL_SECONDS * 4)
        granted = _granted(key)
    renewed = _Renewed(key, granted, record)
    try:
        yield renewed
    finally:
        renewed.end()


def _give_back(record: Path) -> None:
    """End the lease of a process of this machine that is gone: its lock is ours.

    Not one that may be over by now: the server ends that itself, and what is ended twice would free another's.
    """
    if not record.is_file():
        return
    known, age = record.read_text(), time.time() - record.stat().st_mtime
    # A process that was killed before it could write this leaves it empty.
    if known and age < LEASE_SECONDS - RENEW_SECONDS:
        with suppress(HTTPError), _client() as client:
            client.release_concurrency_slots_with_lease(UUID(known))
    record.unlink()


def forget_old(client: SyncPrefectClient, now: datetime) -> int:
    """Delete the limits of keys that nobody has asked for in a day, and say how many: Prefect's page lists each of them."""
    found, every = client.read_global_concurrency_limits(limit=PAGE), []
    while found:
        every += found
        found = client.read_global_concurrency_limits(limit=PAGE, offset=len(every))
    old = [one.name for one in every if one.name.startswith(OURS) and not one.active_slots and _since(one.updated, now) > KEPT]
    for name in old:
        client.delete_global_concurrency_limit_by_name(name)
    return len(old)


def _since(then: datetime | None, now: datetime) -> timedelta:
    return timedelta(0) if then is None else now - then


def _limit(key: str) -> str:
    return f"{OURS}{key[:32]}"


def _granted(key: str) -> UUID | None:
    """A lease, or None while somebody else has it."""
    from prefect.exceptions import ObjectAlreadyExists

    with _client() as client:
        # A limit that does not exist lets everybody through.
        with suppress(ObjectAlreadyExists):
            client.upsert_global_concurrency_limit_by_name(_limit(key), 1)
        try:
            answer = client.increment_concurrency_slots_with_lease([_limit(key)], 1, "concurrency", LEASE_SECONDS)
        except HTTPStatusError as error:
            if error.response.status_code == HTTPStatus.LOCKED:
                return None
            raise
    return UUID(answer.json()["lease_id"])


def _taken(key: str) -> bool:
    from prefect.exceptions import ObjectNotFound

    with _client() as client:
        try:
            return client.read_global_concurrency_limit_by_name(_limit(key)).active_slots > 0
        except ObjectNotFound:
            return False


def _client() -> SyncPrefectClient:
    # Prefect takes most of a second to import, and reads the environment then.
    from prefect import get_client

    return get_client(sync_client=True)
