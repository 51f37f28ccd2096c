"""One at a time, by a name: the only place from which rounds and promotions take a lease."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from tasks.lease import Held, lease
from tasks.store import Store

POLL_SECONDS = 1.0


class BusyError(Exception):
    """Another process is at it; the text says which."""


def exclusive(store: Store, key: str) -> AbstractContextManager[Held]:
    """Hold a key's lease for the length of a block, waiting for whoever has it."""
    return lease(store.root / "leases", key)


@contextmanager
def or_busy(store: Store, key: str, patience: float = 0.0) -> Iterator[None]:
    """The same, but raise BusyError when somebody has it after `patience` seconds."""

    def refuse(owner: str) -> None:
        raise BusyError(owner)

    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lease(store.root / "leases", key, refuse))
                break
            except BusyError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)
        yield
