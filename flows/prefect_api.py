"""Prefect's API as it is served here: on SQLite it never stops for a statement that failed a while ago.

SQLAlchemy closes a cursor of aiosqlite after a statement that went well, and leaves one that failed to Python. Its error's
traceback holds it, in a cycle, until the garbage collector comes by: in the thread of the event loop, as a rule. If the same
connection waits for the database's lock just then, SQLite lets nobody else touch it, the loop waits with it, whoever has the
lock cannot go on, and the whole API is silent until the lock's time-out: 60 s (seen with SQLAlchemy 2.0.57, aiosqlite 0.22.1).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import aiosqlite
from fastapi import FastAPI

METHODS = ("execute", "executemany")
Execute = Callable[..., Awaitable[aiosqlite.Cursor]]


def create_app() -> FastAPI:
    """What uvicorn serves."""
    close_failed_cursors()
    # Prefect reads its settings when it is imported.
    from prefect.server.api import server

    return server.create_app()


def close_failed_cursors() -> None:
    """From now on a cursor of aiosqlite whose statement fails is closed, in its connection's own thread."""
    for name in METHODS:
        setattr(aiosqlite.Cursor, name, _closing(getattr(aiosqlite.Cursor, name)))


def _closing(execute: Execute) -> Execute:
    async def closing(cursor: aiosqlite.Cursor, *arguments: Any) -> aiosqlite.Cursor:
        try:
            return await execute(cursor, *arguments)
        except Exception:
            await cursor.close()
            raise

    return closing
