"""The r1 quickstart on a fresh seed: what it promises to show, from the JSON that it prints; then all of it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import run_recipe

pytestmark = pytest.mark.slow
COMMAND = ("r1-quickstart", "--seed", "11")


def test_a_base_model_learns_to_reason_and_teaches_a_student(tmp_path: Path) -> None:
    stages = run_recipe(tmp_path, *COMMAND)
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
    assert after["rewards.lists_helpful"] > before["rewards.lists_helpful"]

    again = run_recipe(tmp_path, *COMMAND)
    assert {stage["status"] for stage in again.values()} == {"skipped"}
    planned = run_recipe(tmp_path, *COMMAND, "--set", "distilled.steps=100", "--dry-run")
    assert {name for name, stage in planned.items() if stage["action"] == "run"} == {"distilled", "evaluate-distilled"}
