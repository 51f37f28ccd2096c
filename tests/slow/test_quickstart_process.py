"""The quickstart with a process model on a fresh seed: it finds wrong steps, and GRPO learns from it by the step."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import run_recipe

pytestmark = pytest.mark.slow


def test_a_process_model_teaches_by_the_step(tmp_path: Path) -> None:
    stages = {name: stage["metrics"] for name, stage in run_recipe(tmp_path, "quickstart-process", "--seed", "11").items()}
    reward, sft, grpo = (stages[name] for name in ("reward_model", "evaluate-sft", "evaluate-grpo"))
    print({name: round(value, 3) for name, value in reward.items() if "low" not in name and "high" not in name})
    print({name: round(one["accuracy"], 3) for name, one in (("sft", sft), ("grpo", grpo))}, round(grpo["kl"], 2))
    assert reward["step_accuracy"] >= 0.8
    assert reward["first_wrong_found"] >= 0.7
    assert reward["calibration_error"] < 0.1
    assert grpo["accuracy"] >= sft["accuracy"] + 0.10
    assert grpo["win_rate"] >= 0.55
