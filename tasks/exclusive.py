"""One at a time, by a name: the only place from which rounds and promotions take a lease."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from tasks.lease import lease
from tasks.store import Store


class BusyError(Exception):
    """Another process is at it; the text says which."""


def exclusive(store: Store, key: str, waiting: Callable[[str], None] = lambda _: None) -> AbstractContextManager[None]:
    """Hold a key's lease for the length of a block, waiting for whoever has it; `waiting` hears once who that is."""
    return lease(store.root / "leases", key, waiting)


def or_busy(store: Store, key: str) -> AbstractContextManager[None]:
    """The same, but raise BusyError at once when somebody has it."""

    def refuse(owner: str) -> None:
        raise BusyError(owner)

    return exclusive(store, key, refuse)
