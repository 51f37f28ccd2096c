"""Where state lives, and whose servers keep it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_cli import environment_for

from tasks.home import is_up

SHOW = (
    "import os\nfrom tasks.home import configure_environment, server\nconfigure_environment()\n"
    "print(server(), os.environ.get('PREFECT_API_URL'), os.environ.get('POSTTRAIN_ARTIFACTS'))\n"
)


def shown(state: Path, **given: str) -> list[str]:
    """What a process over this state uses: MLflow's server, Prefect's API, the folder of artifacts."""
    environment = environment_for(state) | given
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def up(tmp_path: Path) -> dict[str, object]:
    """The record of servers that are up."""
    record = {"pid": os.getpid(), "prefect": "http://p:1", "mlflow": "http://m:2", "artifacts": str(tmp_path / "artifacts")}
    (tmp_path / "up.json").write_text(json.dumps(record))
    return record


def test_servers_that_are_up_are_used(tmp_path: Path, up: dict[str, object]) -> None:
    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_up(tmp_path) == up
        assert shown(tmp_path) == ["http://m:2", "http://p:1/api", str(tmp_path / "artifacts")]
        assert shown(tmp_path, PREFECT_API_URL="http://q:3/api") == ["None", "http://q:3/api", "None"], "what is said stands"


def test_a_record_that_nobody_holds_is_of_the_dead(tmp_path: Path, up: dict[str, object]) -> None:
    assert is_up(tmp_path) is None
    (tmp_path / "up.lock").write_text("")
    assert is_up(tmp_path) is None
    assert shown(tmp_path) == ["None", "None", "None"]


def test_one_that_is_just_starting_is_not_up(tmp_path: Path) -> None:
    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_up(tmp_path) is None
        (tmp_path / "up.json").write_text("{")
        assert is_up(tmp_path) is None


def test_servers_elsewhere_are_named_by_the_environment(tmp_path: Path) -> None:
    given = {"MLFLOW_TRACKING_URI": "http://m:2", "PREFECT_API_URL": "http://p:1/api"}
    assert shown(tmp_path, **given) == ["http://m:2", "http://p:1/api", "None"]
