"""The dpo flow: which step reads what, for each way from SFT to an aligned policy; what does not go together; a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from planning import Seen, noted

from flows.dpo import DpoRecipe, steps
from flows.recipe import parse, read_recipe
from flows.runner import plan_pipeline
from stages.errors import InputError

TINY = ROOT / "tests" / "tiny" / "dpo.yaml"
DPO, KTO = {"name": "dpo"}, {"name": "kto", "objective": {"name": "kto"}}
LAST = {"policy": "{}.checkpoint", "reference": "{}.checkpoint"}


def planned(*methods: dict[str, Any], **changes: Any) -> Seen:
    values = read_recipe(TINY) | ({"methods": list(methods)} if methods else {}) | changes
    return noted(parse(DpoRecipe, {name: value for name, value in values.items() if value is not None}, "dpo.yaml"), steps)


def from_(step: str) -> dict[str, str]:
    return {port: source.format(step) for port, source in LAST.items()}


def test_methods_start_from_sft_and_are_measured_against_it() -> None:
    seen = planned(DPO, {"name": "other", "objective": {"name": "ipo"}})
    known = {"train_log_probs": "reference.train", "heldout_log_probs": "reference.heldout"}
    labels = {"train": "labels.train", "heldout": "labels.heldout"}
    for name in ("dpo", "other"):
        assert seen.read[name] == from_("sft") | labels | known
        against = {"reference": "sft.checkpoint", "opponent": "sft.checkpoint", "reward_model": "reward_model.checkpoint"}
        assert seen.read[f"evaluate-{name}"] == against | {"policy": f"{name}.checkpoint", "prompts": "prompts.heldout"}
    assert seen.read["reference"] == {"model": "sft.checkpoint"} | labels
    assert seen.read["evaluate-sft"]["opponent"] == "base.checkpoint"


def test_the_reference_is_asked_once_a_form_and_not_without_need() -> None:
    seen = planned(DPO, KTO, {"name": "simpo", "objective": {"name": "simpo"}})
    assert [name for name, (stage, _) in seen.made.items() if stage == "log_probs"] == ["reference", "reference-unpaired"]
    assert seen.read["kto"]["train_log_probs"] == "reference-unpaired.train"
    assert "train_log_probs" not in seen.read["simpo"]
    by_segment = planned(DPO, {"name": "fine", "objective": {"name": "two_d_dpo"}})
    assert by_segment.read["fine"]["train_log_probs"] == "reference-segments.train"
    assert by_segment.read["fine"]["train"] == by_segment.read["dpo"]["train"] == "labels.train"
    asked, used = seen.made["reference-unpaired"][1], seen.made["kto"][1]
    assert (asked.form, asked.max_length, asked.dtype) == ("unpaired", used.max_length, used.dtype)


def test_a_method_changes_the_shared_settings_only_where_it_says_so() -> None:
    seen = planned(DPO, KTO, {"name": "fast", "lr": 0.5})
    dpo, kto, fast = (seen.made[name][1] for name in ("dpo", "kto", "fast"))
    assert (dpo.optimizer.lr, dpo.pairing.of_rankings, dpo.seed) == (1e-3, "best", 3)
    assert fast == dpo.model_copy(update={"optimizer": dpo.optimizer.model_copy(update={"lr": 0.5})})
    # KTO learns from no pairs: among which it was to choose is nothing to it.
    assert (kto.objective.name, kto.pairing.of_rankings) == ("kto", "all")


def test_a_curriculum_goes_from_far_to_near_each_part_from_the_last_policy() -> None:
    seen = planned({"name": "curry", "how": "curriculum", "iterations": 3})
    assert [seen.read[name] | from_("x") == seen.read[name] for name in ("curry", "curry-2")] == [False, False]
    for name, last in (("curry", "sft"), ("curry-2", "curry"), ("curry-3", "curry-2")):
        assert from_(last).items() <= seen.read[name].items()
        assert seen.read[name]["train"] == "labels.train"
    parts = [
        (one.pairing.part, one.pairing.parts, one.seed) for one in (seen.made[n][1] for n in ("curry", "curry-2", "curry-3"))
    ]
    assert parts == [(1, 3, 3), (2, 3, 4), (3, 3, 5)]
    # Only SFT's log-probs are known ahead.
    assert ["train_log_probs" in seen.read[name] for name in ("curry", "curry-2", "curry-3")] == [True, False, False]
    assert seen.read["evaluate-curry"]["policy"] == "curry-3.checkpoint"


def test_online_learns_from_samples_of_the_policy_as_it_is() -> None:
    seen = planned({"name": "online", "how": "online", "iterations": 2})
    assert seen.read["online-samples"] == {"policy": "sft.checkpoint", "prompts": "prompts.train"}
    assert seen.read["online-samples-2"] == {"policy": "online.checkpoint", "prompts": "prompts.train"}
    assert seen.read["online-labels-2"] == {"samples": "online-samples-2.samples", "reward_model": "reward_model.checkpoint"}
    assert seen.read["online-2"] == from_("online") | {"train": "online-labels-2.train", "heldout": "labels.heldout"}
    assert [seen.made[name][1].seed for name in ("online-samples", "online-samples-2", "online-labels-2")] == [3, 4, 4]


def test_the_first_reference_stays_if_it_is_asked_for() -> None:
    seen = planned({"name": "online", "how": "online", "iterations": 2, "reference": "first"})
    assert (seen.read["online-2"]["policy"], seen.read["online-2"]["reference"]) == ("online.checkpoint", "sft.checkpoint")


def test_a_labeller_with_a_reward_needs_no_model() -> None:
    relabel = {"reward": {"name": "length"}, "heldout": 0}
    seen = planned({"name": "online", "how": "online"}, relabel=relabel, reward_model=None)
    assert seen.read["online-labels"] == {"samples": "online-samples.samples"}
    assert "reward_model" not in seen.read
    # With both, the model only measures.
    seen = planned({"name": "online", "how": "online"}, relabel=relabel)
    assert seen.read["online-labels"] == {"samples": "online-samples.samples"}
    assert seen.read["evaluate-online"]["reward_model"] == "reward_model.checkpoint"


def test_in_self_play_samples_lose_to_demonstrations() -> None:
    seen = planned({"name": "spin", "how": "spin", "iterations": 2, "objective": {"name": "spin"}})
    assert seen.read["spin-samples-2"] == {"policy": "spin.checkpoint", "prompts": "demonstrations.train"}
    assert seen.read["spin-labels-2"] == {"samples": "spin-samples-2.samples", "demonstrations": "demonstrations.train"}
    assert from_("spin").items() <= seen.read["spin-2"].items()
    assert seen.read["spin-2"]["train"] == "spin-labels-2.train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [DPO, DPO]}, "two have one name"),
        ({"methods": []}, "methods"),
        ({"methods": [DPO | {"iterations": 2}]}, "offline is one pass"),
        ({"methods": [KTO | {"how": "curriculum"}]}, "a curriculum is of pairs"),
        ({"methods": [KTO | {"how": "spin"}]}, "spin trains by the objective spin"),
        ({"methods": [DPO | {"how": "online"}], "resample": None}, "need the step resample"),
        ({"methods": [DPO | {"how": "online"}], "relabel": None}, "need the step relabel"),
        ({"reward_model": None}, "relabel needs a `reward`, or the step reward_model"),
        ({"methods": [DPO | {"objective": {"beta": 0}}]}, "beta"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**changes)


def test_a_tiny_recipe_runs_every_way_and_would_then_be_skipped(tmp_path: Path) -> None:
    environment = os.environ | {"POSTTRAIN_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY), "--json"]

    def run(*more: str) -> tuple[list[dict[str, Any]], str]:
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)["stages"], done.stderr

    first, said = run()
    assert {stage["status"] for stage in first} == {"ran"}
    assert {stage["action"] for stage in run("--dry-run")[0]} == {"skip"}
    # What the steps have made, given in their place, is read as they made it: all that follows is there.
    own = [*(f"{name}=models:/tiny-dpo-{name}/1" for name in ("base", "sft", "reward_model"))]
    sets = ("prompts", "prompts"), ("demonstrations", "demonstrations"), ("preferences", "labels"), ("reference", "reference")
    own += [f"{name}_{part}=datasets:/tiny-dpo-{made}-{part}/1" for name, made in sets for part in ("train", "heldout")]
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("POSTTRAIN_HOME", str(tmp_path))
        entered = read_recipe(TINY, [f"inputs.{one}" for one in own])
        plans = plan_pipeline(parse(DpoRecipe, entered, "dpo.yaml"), steps).plans
    given = {"base", "sft", "reward_model", *(name for name, _ in sets)}
    assert {name: plan.action for name, _, plan in plans} == {
        stage["name"]: "given" if stage["name"] in given else "skip"
        for stage in [*first, {"name": "preferences"}]
        if stage["name"] not in ("corpus", "samples", "labels")
    }

    by_name = {stage["name"]: stage for stage in first}
    assert {"pair_accuracy", "reward_margin", "kl", "win_rate", "length"} <= by_name["dpo"]["metrics"].keys()
    assert by_name["dpo"]["metrics"]["kl_before"] == pytest.approx(0, abs=1e-4)
    assert {"win_rate", "kl"} <= by_name["evaluate-online"]["metrics"].keys()
    assert len(list((tmp_path / "plots").glob("tiny-dpo-methods-*.png"))) == 1
    assert len(list((tmp_path / "plots").glob("tiny-dpo-*.png"))) == 1 + 8
    assert "models side by side" in said
