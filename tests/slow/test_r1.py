"""The r1 quickstart on a fresh seed: what it promises to show, from the JSON that it prints; then all of it is skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def r1(state: Path, *more: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows.cli", "run", "configs/r1-quickstart.yaml", "--json", "--seed", "11", *more]
    environment["POSTTRAIN_HOME"] = str(state)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def test_a_base_model_learns_to_reason_and_teaches_a_student(tmp_path: Path) -> None:
    stages = r1(tmp_path)
    found = {name.removeprefix("evaluate-"): stage["metrics"] for name, stage in stages.items() if name.startswith("evaluate-")}
    for name, metrics in found.items():
        print(name, {one: round(metrics[one], 3) for one in ("accuracy", "rewards.format", "thinking", "length")})
    assert found["base"]["accuracy"] < 0.30
    assert found["zero"]["accuracy"] >= 0.75
    assert found["zero"]["rewards.format"] >= 0.9
    assert found["zero"]["length"] >= 1.5 * found["base"]["length"]
    assert found["cold_start"]["accuracy"] >= found["base"]["accuracy"] + 0.2
    assert found["reasoning"]["accuracy"] >= found["cold_start"]["accuracy"]
    assert found["sft"]["accuracy"] >= 0.85
    assert found["second"]["accuracy"] >= found["sft"]["accuracy"] - 0.05
    assert found["distilled"]["accuracy"] >= found["student_rl"]["accuracy"] + 0.25
    # The second RL is about the general prompts.
    before, after = (stages[f"general-{name}"]["metrics"] for name in ("sft", "second"))
    print(
        {name: (round(before[name], 3), round(after[name], 3)) for name in ("rewards.lists_helpful", "rewards.lists_harmless")}
    )
    assert after["rewards.lists_harmless"] > before["rewards.lists_harmless"]

    again = r1(tmp_path)
    assert {stage["status"] for stage in again.values()} == {"skipped"}
    planned = r1(tmp_path, "--set", "distilled.steps=100", "--dry-run")
    assert {name for name, stage in planned.items() if stage["action"] == "run"} == {"distilled", "evaluate-distilled"}
