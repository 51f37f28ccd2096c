"""One at a time, by a name: the only place from which rounds and promotions take a lease."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from tasks.lease import LEASE_SECONDS, Held, Waiting, lease, lock, served
from tasks.store import Store

POLL_SECONDS = 1.0
# By then the lease of a process that was lost is over.
PATIENCE_SECONDS = LEASE_SECONDS + 30


class BusyError(Exception):
    """Another process is at it; the text says which."""


def exclusive(store: Store, key: str) -> AbstractContextManager[Held]:
    """Hold a key's lease for the length of a block, waiting for whoever has it."""
    return lease(store.root / "leases", key)


@contextmanager
def or_busy(store: Store, key: str, waiting: Waiting = lambda _: None) -> Iterator[None]:
    """The same, but raise BusyError when somebody is at it: at once if on this machine.

    On another machine somebody who is alive cannot be told from one who was lost, until that one's lease is over: `waiting` is
    told once who it is.
    """

    def refuse(owner: str) -> None:
        raise BusyError(owner)

    deadline, told = time.monotonic() + PATIENCE_SECONDS, False
    folder = store.root / "leases"
    with lock(folder, key, refuse), ExitStack() as stack:
        while True:
            try:
                stack.enter_context(served(folder, key, refuse))
                break
            except BusyError as busy:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    waiting(str(busy))
                    told = True
                time.sleep(POLL_SECONDS)
        yield
