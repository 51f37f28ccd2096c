"""Running a recipe as a user does: by the command, in a process of its own, with a state folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT


def run_recipe(state: Path, recipe: str, *more: str, timeout: float = 1800) -> dict[str, dict[str, Any]]:
    """The stages by name, as `posttrain run --json` reports them; `more` are further arguments."""
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "flows.cli", "run", f"configs/{recipe}.yaml", "--json", *more]
    environment["POSTTRAIN_HOME"] = str(state)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def settings(*given: str) -> list[str]:
    """`path=value` as arguments of the command."""
    return [word for one in given for word in ("--set", one)]
