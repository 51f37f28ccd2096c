"""The rlhf flow with GRPO in PPO's place: its outer iterations, and reward models that have seen the last one's samples."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT
from planning import Seen, noted

from flows.recipe import parse, read_recipe
from flows.rlhf import RlhfRecipe, steps
from stages.errors import InputError

GRPO = {"rewards": [{"name": "reward_model"}], "steps": 2}


def planned(**changes: Any) -> Seen:
    values = {
        name: value for name, value in read_recipe(ROOT / "tests" / "tiny" / "rlhf.yaml").items() if name not in ("ppo", "ptx")
    }
    values["inputs"] = {name: reference for name, reference in values["inputs"].items() if name != "ptx"}
    changed = values | {"grpo": GRPO} | changes
    return noted(parse(RlhfRecipe, {name: value for name, value in changed.items() if value is not None}, "rlhf.yaml"), steps)


def test_grpo_takes_ppos_place() -> None:
    seen = planned()
    assert seen.read["grpo"] == {
        "policy": "sft.checkpoint",
        "prompts": "prompts.train",
        "reward_model": "reward_model.checkpoint",
    }
    assert seen.read["evaluate-grpo"]["policy"] == "grpo.checkpoint"
    assert not {"ppo", "evaluate-ppo"} & seen.read.keys()


def test_each_iteration_goes_on_from_the_last() -> None:
    seen = planned(iterations=3)
    assert [seen.read[name]["policy"] for name in ("grpo", "grpo-2", "grpo-3")] == [
        "sft.checkpoint",
        "grpo.checkpoint",
        "grpo-2.checkpoint",
    ]
    # Without an input of its own the reference is the policy that an iteration starts from.
    assert all("reference" not in seen.read[name] for name in ("grpo", "grpo-2", "grpo-3"))
    assert [seen.made[name][1].seed for name in ("grpo", "grpo-2", "grpo-3")] == [3, 4, 5]
    assert seen.read["evaluate-grpo"]["policy"] == "grpo-3.checkpoint"
    assert {one["reward_model"] for name, one in seen.read.items() if name.startswith("grpo")} == {"reward_model.checkpoint"}
    assert "samples-2" not in seen.read


def test_refitting_learns_from_all_preferences_so_far() -> None:
    seen = planned(iterations=3, refit=True)
    assert seen.read["samples-2"] == {"policy": "grpo.checkpoint", "prompts": "prompts.train"}
    assert seen.read["labels-2"] == {"samples": "samples-2.samples"}
    assert seen.read["preferences-2"] == {"source": "labels.train", "also": "labels-2.train"}
    assert seen.read["preferences-3"] == {"source": "preferences-2.train", "also": "labels-3.train"}
    first, second = seen.read["reward_model"], seen.read["reward_model-2"]
    assert second == first | {"train": "preferences-2.train", "samples": "samples-2.samples"}
    assert seen.read["reward_model-3"]["train"] == "preferences-3.train"
    models = [seen.read[name]["reward_model"] for name in ("grpo", "grpo-2", "grpo-3")]
    assert models == ["reward_model.checkpoint", "reward_model-2.checkpoint", "reward_model-3.checkpoint"]
    assert [seen.made[name][1].seed for name in ("samples", "samples-2", "labels-3")] == [3, 4, 5]
    # What measures all policies is the first reward model.
    assert seen.read["evaluate-grpo"]["reward_model"] == "reward_model.checkpoint"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": None}, "either the step ppo or the step grpo"),
        ({"ppo": {}}, "either the step ppo or the step grpo"),
        ({"grpo": None, "ppo": {}, "iterations": 2}, "iterations and refit are grpo's"),
        ({"grpo": None, "ppo": {}, "refit": True}, "iterations and refit are grpo's"),
        ({"refit": True, "samples": None}, "refit needs the steps samples and labels"),
        ({"refit": True, "labels": None}, "refit needs the steps samples and labels"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**changes)
