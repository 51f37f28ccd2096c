"""The rlhf flow with a process model: what reads it, what does not go together, and a whole run of the tiny recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from planning import Seen, noted

from flows.recipe import parse, read_recipe
from flows.rlhf import RlhfRecipe, steps
from stages.errors import InputError

PROCESS: dict[str, Any] = {"name": "process_model", "args": {"steps": ";|</think>"}}
LABELS: dict[str, Any] = {"reward": {"name": "chain_sum"}, "form": "steps", "heldout": 0.2}
GRPO: dict[str, Any] = {"rewards": [PROCESS], "supervision": "process", "steps": 2, "prompts": 4, "group": 3}
GRPO |= {"sampling": {"max_new_tokens": 8}, "refill": {"rounds": 1}, "runtime": {"device": "cpu"}}
MEASURED: dict[str, Any] = {"rewards": [PROCESS], "sampling": {"max_new_tokens": 8}, "bootstrap": 100}


def recipe(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with step labels, a process model and GRPO."""
    values = read_recipe(ROOT / "tests" / "tiny" / "rlhf.yaml")
    values["inputs"] = {name: reference for name, reference in values["inputs"].items() if name != "ptx"}
    values["reward_model"] |= {"step_separator": ""}
    values |= {"ppo": None, "ptx": None, "labels": LABELS, "grpo": GRPO, "evaluate": MEASURED} | changes
    return {name: value for name, value in values.items() if value is not None}


def planned(**changes: Any) -> Seen:
    return noted(parse(RlhfRecipe, recipe(**changes), "rlhf.yaml"), steps)


def test_the_model_goes_to_the_port_that_rewards_ask_for() -> None:
    seen = planned(iterations=2, refit=True)
    # It is not shifted or scaled, so it reads neither demonstrations nor samples.
    learnt = {"model": "sft.checkpoint", "train": "labels.train", "heldout": "labels.heldout"}
    assert seen.read["reward_model"] == learnt
    assert seen.read["reward_model-2"] == learnt | {"train": "preferences-2.train"}
    policy = {"policy": "sft.checkpoint", "prompts": "prompts.train"}
    assert seen.read["grpo"] == policy | {"process_model": "reward_model.checkpoint"}
    assert seen.read["grpo-2"]["process_model"] == "reward_model-2.checkpoint"
    for name in ("base", "sft", "grpo"):
        read = seen.read[f"evaluate-{name}"]
        assert read["process_model"] == "reward_model.checkpoint"
        assert "reward_model" not in read
    unmeasured = planned(evaluate=MEASURED | {"rewards": [{"name": "chain_sum"}]})
    assert not {"process_model", "reward_model"} & unmeasured.read["evaluate-grpo"].keys()


def test_step_labels_may_be_given() -> None:
    values = recipe(samples=None, labels=None)
    values["inputs"] |= {"preferences": "./prm800k.jsonl"}
    seen = noted(parse(RlhfRecipe, values, "rlhf.yaml"), steps)
    assert seen.read["reward_model"]["train"] == "preferences.train"
    assert seen.read["grpo"]["process_model"] == "reward_model.checkpoint"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": LABELS | {"form": "pairs"}, "evaluate": {}},
            "labels.form: steps makes a process model, .* have both or neither",
        ),
        ({"grpo": None, "ppo": {}, "evaluate": {}}, "labels.form: steps makes a process model, .* have both or neither"),
        ({"grpo": {"rewards": [{"name": "reward_model"}]}, "evaluate": {}}, "have both or neither"),
        ({"grpo": {"rewards": [PROCESS, {"name": "reward_model"}]}}, "name reward_model and process_model, .* makes one"),
        (
            {"grpo": {"rewards": [{"name": "reward_model"}]}, "labels": LABELS | {"form": "pairs"}},
            "evaluate.rewards name process_model, which the recipe does not make",
        ),
        (
            {"grpo": {"rewards": [PROCESS | {"args": {"steps": "("}}]}},
            r"grpo.rewards.0.args: steps: '\(' is no regular expression",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**changes)


def test_the_tiny_recipe_runs(tmp_path: Path) -> None:
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"POSTTRAIN_HOME": str(tmp_path / "home")}
    (tmp_path / "process.yaml").write_text(yaml.safe_dump(recipe(name="process")))
    command = [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "process.yaml"), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert {"step_accuracy", "step_accuracy_before", "heldout_loss"} <= stages["reward_model"]["metrics"].keys()
    assert {"rewards.process_model", "groups_without_spread"} <= stages["grpo"]["metrics"].keys()
    assert 0 < stages["evaluate-grpo"]["metrics"]["rewards.process_model"] < 1
