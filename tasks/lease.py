"""One owner a key at a time: an operating-system lock, which two processes cannot both hold and which dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

POLL_SECONDS = 0.5


@contextmanager
def lease(folder: Path, key: str, waiting: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the key's lease for the length of the block, waiting for another owner to end.

    `waiting` is told once who the owner is. The lock file records process, host and start, for people to see.
    """
    path = folder / f"{key[:32]}.lock"
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


def held(folder: Path, key: str) -> bool:
    """Whether another process holds the key's lease right now."""
    path = folder / f"{key[:32]}.lock"
    if not path.is_file():
        return False
    with path.open("a+") as file:
        free = _acquire(file.fileno())
        if free:
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
        return not free


def _acquire(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
