"""Prefect's state in a PostgreSQL in place of SQLite; its password stays with the server."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from room import Room, free_port, room, wait_for
from test_kills_on_pools import RECIPE, ROWS, tags

pytestmark = pytest.mark.slow
USER = "postgres"


@dataclass(frozen=True)
class Postgres:
    """A server of PostgreSQL on loopback."""

    programs: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://{USER}:{self.password}@127.0.0.1:{self.port}/prefect"

    def call(self, program: str, *arguments: str) -> str:
        command = [str(self.programs / program), "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, *arguments]
        environment = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL here (Debian: postgresql)")
    made = Postgres(found[-1], free_port(), secrets.token_hex(16))
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    # It refuses to be root, and pytest's folders are root's alone.
    owner = {"user": USER, "group": USER, "extra_groups": ()} if os.getuid() == 0 else {}
    if owner:
        shutil.chown(folder, USER, USER)
    (folder / "password").write_text(made.password)
    data = str(folder / "data")
    initdb = [str(found[-1] / "initdb"), "-D", data, "-U", USER, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **owner)
    command = [str(found[-1] / "postgres"), "-D", data, "-p", str(made.port), "-h", "127.0.0.1", "-k", str(folder)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **owner)
    try:
        ready = [str(found[-1] / "pg_isready"), "-h", "127.0.0.1", "-p", str(made.port)]
        wait_for(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, 60, "PostgreSQL")
        made.call("createdb", "prefect")
        yield made
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)


def knowing(up: Room, secret: str) -> list[str]:
    """The command lines of the room's processes that have a secret in their environment."""
    found = [Path("/proc") / str(process) for process in up.processes("")]
    return [(path / "cmdline").read_text() for path in found if secret.encode() in (path / "environ").read_bytes()]


def test_the_state_in_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    for name, values in (("rows", ROWS), ("killed", RECIPE)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    with room(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres.url) as up:
        up.command("run", str(tmp_path / "rows.yaml"))
        twins = [up.submit(tmp_path / "killed.yaml"), up.submit(tmp_path / "killed.yaml")]
        wait_for(up.saved, 240, "a saved state")
        # A process that ends, or has just been forked, is looked at again.
        wait_for(
            lambda: len(knowing(up, postgres.password)) == 2, 20, "a password that up itself and Prefect's server have alone"
        )
        (step,) = [process for parent in twins for run in up.children(parent) for process in up.process_of(run["id"])]
        (server,) = up.processes("flows.prefect_api:create_app")
        for process in (server, step):
            os.kill(process, signal.SIGKILL)
        for parent in twins:
            up.completed(parent)
        (made,) = up.mlflow_runs("sft")
        assert (made["info"]["status"], tags(made)["posttrain.status"]) == ("FINISHED", "resumed")
        assert up.working() == []
    assert not list((up.state / "prefect").glob("prefect.db*"))
    count = "select count(*) from flow_run where state_type = 'COMPLETED'"
    assert int(postgres.call("psql", "-d", "prefect", "-Atc", count)) >= len(twins) + 1
    told = [file for file in up.state.rglob("*") if file.is_file() and postgres.password.encode() in file.read_bytes()]
    assert not told
    assert postgres.password not in up.log.read_text()
