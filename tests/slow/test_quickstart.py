"""The README's main command on fresh seeds: what it promises to show, from the JSON that it prints."""

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


def quickstart(state: Path, seed: int, *more: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows.cli", "run", "configs/quickstart.yaml", "--json", "--seed", str(seed), *more]
    environment["POSTTRAIN_HOME"] = str(state)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_stage_learns_on_a_fresh_seed(tmp_path: Path, seed: int) -> None:
    stages = quickstart(tmp_path, seed)
    base, sft, ppo = (stages[f"evaluate-{name}"]["metrics"] for name in ("base", "sft", "ppo"))
    reward = stages["reward_model"]["metrics"]
    print({name: round(metrics["accuracy"], 3) for name, metrics in (("base", base), ("sft", sft), ("ppo", ppo))})
    print({name: round(reward[name], 3) for name in ("pair_accuracy", "pair_accuracy_low", "pair_accuracy_high")})
    print({name: round(ppo[name], 3) for name in ("win_rate", "win_rate_low", "win_rate_high", "kl")})
    assert sft["accuracy"] >= base["accuracy"] + 0.10
    assert sft["win_rate_low"] > 0.5
    assert stages["sft"]["metrics"]["heldout_loss"] < stages["sft"]["metrics"]["heldout_loss_before"]
    assert reward["pair_accuracy"] >= 0.75
    assert reward["calibration_error"] < 0.15
    assert ppo["accuracy"] >= sft["accuracy"] + 0.10
    assert ppo["win_rate"] >= 0.57

    again = quickstart(tmp_path, seed)
    assert {stage["status"] for stage in again.values()} == {"skipped"}
    assert [stage["artifacts"] for stage in again.values()] == [stage["artifacts"] for stage in stages.values()]

    planned = quickstart(tmp_path, seed, "--set", "ppo.reference_kl=0.2", "--dry-run")
    assert {name for name, stage in planned.items() if stage["action"] == "run"} == {"ppo", "evaluate-ppo"}
    assert planned["ppo"]["reason"] == "reference_kl: 0.3 -> 0.2"
