"""`kill -9` of the main command in every stage that trains: the same command goes on, and ends in the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
# States often enough to be killed between two of them.
SETTINGS = ["sft.runtime.save_every=5", "reward_model.runtime.save_every=20", "ppo.runtime.save_every=1"]
COMMAND = [sys.executable, "-m", "flows.cli", "run", "configs/quickstart.yaml", "--json"]
COMMAND += [part for setting in SETTINGS for part in ("--set", setting)]


def environment(state: Path) -> dict[str, str]:
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {"POSTTRAIN_HOME": str(state)}


def run(state: Path) -> dict[str, dict[str, Any]]:
    done = subprocess.run(COMMAND, cwd=ROOT, env=environment(state), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def kill_when(state: Path, after: str, reached: Callable[[list[Path]], bool]) -> None:
    """Start the command; kill it once the step `after` has ended and the next one's states are as `reached` wants."""
    log = state.parent / "log"
    with log.open("w") as file:
        child = subprocess.Popen(COMMAND, cwd=ROOT, env=environment(state), stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 600
            while not (f"\n{after} " in log.read_text() and reached(sorted(state.glob("runs/*/state/step-*")))):
                assert child.poll() is None, f"it ended before it was killed:\n{log.read_text()}"
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(10)


def waits_for_its_update(states: list[Path]) -> bool:
    return any((state / "rollouts.json").is_file() for state in states)


def was_updated(states: list[Path]) -> bool:
    return any(state.name[5:13] > "00000003" and not (state / "rollouts.json").is_file() for state in states)


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, state = run(tmp_path / "whole"), tmp_path / "killed" / "home"
    state.parent.mkdir()
    kill_when(state, "demonstrations", bool)  # in SFT
    kill_when(state, "labels", bool)  # in the reward model
    kill_when(state, "reward_model", waits_for_its_update)  # in PPO's update
    kill_when(state, "reward_model", was_updated)  # in PPO's next rollout
    ended = run(state)
    assert {name for name, stage in ended.items() if stage["status"] == "resumed"} == {"ppo"}
    for name, stage in whole.items():
        digests = {output: made["digest"] for output, made in stage["artifacts"].items()}
        assert {output: made["digest"] for output, made in ended[name]["artifacts"].items()} == digests, name
