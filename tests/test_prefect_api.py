"""Prefect's API as it is served here: a statement that failed on SQLite does not stop its event loop later."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import aiosqlite
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from flows.prefect_api import METHODS, create_app
from flows.server import prefect_settings

WAIT_MS = 3000


def as_prefect_does(connection: DBAPIConnection, _: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute(f"PRAGMA busy_timeout = {WAIT_MS}")
    cursor.close()


async def fail(connection: AsyncConnection, statement: str) -> None:
    try:
        await connection.exec_driver_sql(statement)
    except OperationalError as error:
        kept = error  # its traceback holds this frame, which holds it: a cycle, left to the collector
        assert "locked" in str(kept)
    else:
        raise AssertionError("it had to fail")


async def waits_and_writes(file: Path) -> str:
    """Collect garbage while the connection of a statement that failed waits for the lock: whether it writes once it can."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    event.listen(engine.sync_engine, "connect", as_prefect_does)
    async with engine.connect() as holder, engine.connect() as waiter:
        await holder.exec_driver_sql("CREATE TABLE rows (x)")
        await waiter.exec_driver_sql("BEGIN")
        await waiter.exec_driver_sql("SELECT * FROM rows")
        await holder.exec_driver_sql("INSERT INTO rows VALUES (1)")
        await fail(waiter, "INSERT INTO rows VALUES (2)")
        await waiter.exec_driver_sql("ROLLBACK")
        await holder.exec_driver_sql("BEGIN IMMEDIATE")
        writing = asyncio.create_task(waiter.exec_driver_sql("INSERT INTO rows VALUES (3)"))
        await asyncio.sleep(0.3)
        gc.collect()
        await holder.exec_driver_sql("ROLLBACK")
        try:
            await writing
        except OperationalError:
            return "timed out"
        finally:
            await engine.dispose()
    return "written"


@pytest.mark.parametrize("served", [False, True])
def test_a_failed_statement_does_not_stop_the_loop(served: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in METHODS:
        monkeypatch.setattr(aiosqlite.Cursor, name, getattr(aiosqlite.Cursor, name))
    if served:
        theirs = FastAPI()
        monkeypatch.setattr("prefect.server.api.server.create_app", lambda: theirs)
        assert create_app() is theirs
    gc.disable()
    try:
        # Where the first is "written" the libraries close it themselves, and flows/prefect_api.py is no longer needed.
        assert asyncio.run(waits_and_writes(tmp_path / "rows.db")) == ("written" if served else "timed out")
    finally:
        gc.enable()


def test_only_the_server_is_told_of_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+asyncpg://ada:secret@db/prefect"
    told = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url, "PREFECT_API_DATABASE_TIMEOUT": "30"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert prefect_settings(tmp_path, "http://127.0.0.1:4200").items() >= told.items()
    assert not os.environ.keys() & told.keys()
