"""The README's main command on fresh seeds: what it promises to show, from the JSON that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import run_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_stage_learns_on_a_fresh_seed(tmp_path: Path, seed: int) -> None:
    command = ("quickstart", "--seed", str(seed))
    stages = run_recipe(tmp_path, *command)
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

    again = run_recipe(tmp_path, *command)
    assert {stage["status"] for stage in again.values()} == {"skipped"}
    assert [stage["artifacts"] for stage in again.values()] == [stage["artifacts"] for stage in stages.values()]

    planned = run_recipe(tmp_path, *command, "--set", "ppo.reference_kl=0.2", "--dry-run")
    assert {name for name, stage in planned.items() if stage["action"] == "run"} == {"ppo", "evaluate-ppo"}
    assert planned["ppo"]["reason"] == "reference_kl: 0.3 -> 0.2"
