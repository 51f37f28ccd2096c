"""The processes of flow runs on this machine, each with a record that it keeps locked as long as it lives.

Workers tell of a process that ends, but not of those that end with them or that they have left behind. Who looks after the
machine (flows/keeper.py) finds here which runs have lost their process, and which processes no worker has any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Process:
    """A flow run's process, by its record."""

    record: Path
    pid: int
    flow_run: str
    alive: bool


@contextmanager
def recorded(root: Path, flow_run: str) -> Iterator[None]:
    """Keep this process's record for the length of the block."""
    folder = root / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    draft, record = folder / f".{os.getpid()}", folder / f"{os.getpid()}.json"
    with draft.open("w") as file:
        # Locked before it can be seen: a record that is free is that of a process which is gone.
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"pid": os.getpid(), "flow_run": flow_run}, file)
        file.flush()
        draft.rename(record)
        try:
            yield
        finally:
            record.unlink(missing_ok=True)


def known(root: Path) -> list[Process]:
    """All of this machine that have not ended well."""
    found = []
    for record in sorted((root / "processes").glob("*.json")):
        # It may end, and its record with it, at any time.
        with suppress(FileNotFoundError), record.open() as file:
            fields = json.load(file)
            found.append(Process(record, fields["pid"], fields["flow_run"], _locked(file.fileno()) and _exists(fields["pid"])))
    return found


def stop_left(root: Path) -> int:
    """Stop those that live, once their workers are gone; how many."""
    living = [one for one in known(root) if one.alive]
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 1.0)):
        for one in known(root):
            if one.alive:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, number)
        deadline = time.monotonic() + seconds
        while any(one.alive for one in known(root)) and time.monotonic() < deadline:
            time.sleep(0.1)
    return len(living)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _exists(pid: int) -> bool:
    """A child that was forked keeps its parent's lock."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
