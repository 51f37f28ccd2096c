"""The r1 flow: which steps there are, what each reads, what may be left out, and a whole run of the tiny recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from planning import Seen, noted

from flows.r1 import DEFINITION, R1Recipe, steps
from flows.recipe import parse, read_recipe
from stages.errors import InputError

TINY = ROOT / "tests" / "tiny" / "r1.yaml"


def planned(values: Mapping[str, Any]) -> Seen:
    return noted(parse(R1Recipe, values, "r1.yaml"), steps)


def tiny(*settings: str, without: tuple[str, ...] = (), inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    values = read_recipe(TINY, settings)
    left = {name: value for name, value in values.items() if name not in without}
    return left | {"inputs": {n: r for n, r in values["inputs"].items() if n not in without} | dict(inputs or {})}


WHOLE = {
    "prompts": {"source": "prompts"},
    "general": {"source": "general"},
    "corpus": {"source": "corpus", "exclude": "prompts.heldout"},
    "base": {"model": "model", "train": "corpus.train", "heldout": "corpus.heldout"},
    "zero": {"policy": "base.checkpoint", "prompts": "prompts.train"},
    "traces": {"policy": "zero.checkpoint", "prompts": "prompts.train"},
    "cold_start_data": {"samples": "traces.samples"},
    "cold_start": {"model": "base.checkpoint", "train": "cold_start_data.train"},
    "reasoning": {"policy": "cold_start.checkpoint", "prompts": "prompts.train"},
    "reasoning-2": {"policy": "reasoning.checkpoint", "prompts": "prompts.train"},
    "samples": {"policy": "reasoning-2.checkpoint", "prompts": "prompts.train"},
    "accepted": {"samples": "samples.samples"},
    "general_demonstrations": {"source": "general_demonstrations", "exclude": "general.heldout"},
    "sft_data": {"source": "accepted.train", "also": "general_demonstrations.train"},
    "sft": {"model": "base.checkpoint", "train": "sft_data.train"},
    "mixed": {"source": "prompts.train", "also": "general.train"},
    "answers": {"policy": "sft.checkpoint", "prompts": "general.train"},
    "helpful_labels": {"samples": "answers.samples"},
    "helpful": {"model": "sft.checkpoint", "train": "helpful_labels.train", "heldout": "helpful_labels.heldout"},
    "harmless_labels": {"samples": "answers.samples"},
    "harmless": {"model": "sft.checkpoint", "train": "harmless_labels.train", "heldout": "harmless_labels.heldout"},
    "second": {
        "policy": "sft.checkpoint",
        "prompts": "mixed.train",
        "reward_model": "helpful.checkpoint",
        "safety_model": "harmless.checkpoint",
    },
    "student_base": {"model": "student", "train": "corpus.train", "heldout": "corpus.heldout"},
    "distilled": {"model": "student_base.checkpoint", "train": "accepted.train", "teacher": "second.checkpoint"},
    "student_rl": {"policy": "student_base.checkpoint", "prompts": "prompts.train"},
}
POLICIES = ["base", "zero", "cold_start", "reasoning", "sft", "second", "student_base", "distilled", "student_rl"]
LAST = {"reasoning": "reasoning-2"}


def test_the_second_rl_s_prompts_are_mixed_as_the_recipe_says() -> None:
    assert planned(tiny("mixed.rows=7")).made["mixed"][1].rows == 7
    assert planned(tiny()).made["mixed"][1].rows is None


def test_every_step_reads_what_it_should() -> None:
    seen = planned(tiny())
    measured = {
        f"evaluate-{name}": {"policy": f"{LAST.get(name, name)}.checkpoint", "prompts": "prompts.heldout"} for name in POLICIES
    }
    general = {f"general-{name}": {"policy": f"{name}.checkpoint", "prompts": "general.heldout"} for name in ("sft", "second")}
    assert seen.read == WHOLE | measured | general
    order = list(seen.read)
    assert all(order.index(f"evaluate-{name}") == order.index(LAST.get(name, name)) + 1 for name in POLICIES if name != "sft")
    assert {seen.made[name][0] for name in ("zero", "reasoning-2", "second", "student_rl")} == {"grpo"}
    assert (seen.made["distilled"][0], seen.made["accepted"][0]) == ("distill", "rejection")


def test_each_outer_iteration_draws_anew() -> None:
    made = planned(tiny("reasoning.seed=7", "iterations=3")).made
    configs = [made[name][1] for name in ("reasoning", "reasoning-2", "reasoning-3")]
    assert [one.seed for one in configs] == [7, 8, 9]
    assert len({str(one.model_copy(update={"seed": 0})) for one in configs}) == 1


# Steps left out, and what then reads something else.
WITHOUT = {
    ("corpus", "base", "student_base"): {"zero": "model", "cold_start": "model", "sft": "model", "distilled": "student"},
    ("zero",): {"traces": "base.checkpoint"},
    ("traces", "cold_start_data", "cold_start"): {"reasoning": "zero.checkpoint"},
    ("zero", "traces", "cold_start_data", "cold_start"): {"reasoning": "base.checkpoint"},
    ("reasoning", "iterations"): {"samples": "cold_start.checkpoint"},
    ("sft",): {"second": "reasoning-2.checkpoint", "answers": "reasoning-2.checkpoint"},
    ("second",): {"distilled teacher": "sft.checkpoint"},
    ("general", "answers", "helpful_labels", "harmless_labels", "helpful", "harmless"): {"second prompts": "prompts.train"},
    ("general_demonstrations",): {"sft train": "accepted.train"},
}
FIRST = {"cold_start": "model", "sft": "model", "distilled": "model"}


@pytest.mark.parametrize("left_out", WITHOUT, ids=",".join)
def test_steps_can_be_left_out(left_out: tuple[str, ...]) -> None:
    seen = planned(tiny(without=left_out))
    assert not set(left_out) & (set(seen.read) - {"general"})
    for reader, source in WITHOUT[left_out].items():
        name, _, port = reader.partition(" ")
        assert seen.read[name][port or FIRST.get(name, "policy")] == source


# A saved artifact in place of a step: what is no longer computed, and who reads the artifact.
ENTERED = {
    "base": (("base", "corpus"), {"zero": "policy", "cold_start": "model", "sft": "model"}),
    "zero": (("zero",), {"traces": "policy"}),
    "cold_start_data": (("traces", "cold_start_data"), {"cold_start": "train"}),
    "cold_start": (("traces", "cold_start_data", "cold_start"), {"reasoning": "policy"}),
    "reasoning": (("reasoning", "reasoning-2"), {"samples": "policy"}),
    "accepted": (("samples", "accepted"), {"sft_data": "source", "distilled": "train"}),
    "sft": (("sft_data", "general_demonstrations", "sft"), {"second": "policy", "helpful": "model"}),
    "helpful": (("helpful_labels", "helpful"), {"second": "reward_model"}),
    "harmless": (("harmless_labels", "harmless"), {"second": "safety_model"}),
    "second": (("second", "mixed", "answers", "helpful", "harmless"), {"distilled": "teacher"}),
    "student_base": (("student_base",), {"distilled": "model", "student_rl": "policy"}),
}


@pytest.mark.parametrize("name", ENTERED)
def test_a_saved_artifact_stands_for_a_step(name: str) -> None:
    skipped, readers = ENTERED[name]
    reference = "datasets:/x/1" if name in ("cold_start_data", "accepted") else "models:/x/1"
    read = planned(tiny(inputs={name: reference})).read
    # The corpus is the student's too.
    assert not (set(skipped) - {"corpus"}) & set(read)
    assert {reader: read[reader][port] for reader, port in readers.items()} == dict.fromkeys(readers, name)
    assert f"evaluate-{name}" in read or name not in POLICIES


def test_a_teacher_behind_an_endpoint_takes_the_policys_place() -> None:
    values = tiny()
    values["traces"] |= {"endpoint": {"model": "teacher", "url": "http://localhost:1/v1"}}
    read = planned(values).read
    assert read["traces"] == {"prompts": "prompts.train"}
    assert read["samples"]["policy"] == "reasoning-2.checkpoint"


def test_a_distillation_of_outputs_reads_no_teacher() -> None:
    seen = planned(tiny("distilled.objective=likelihood", "distilled.source=demonstrations"))
    assert seen.read["distilled"] == {"model": "student_base.checkpoint", "train": "accepted.train"}


@pytest.mark.parametrize(("name", "needed"), [(name, one) for name, others in R1Recipe.NEEDS.items() for one in others])
def test_a_step_says_what_it_needs(name: str, needed: str) -> None:
    with pytest.raises(InputError, match=rf"the step \w+ needs {needed}: a step of this name, or inputs\.{needed}"):
        parse(R1Recipe, tiny(without=(needed,)), "r1.yaml")


def test_the_tiny_recipe_runs(tmp_path: Path) -> None:
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"POSTTRAIN_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert len(stages) == len(WHOLE) + len(POLICIES) + 2
    # The tiny student is the model itself: its base and its RL are there already.
    same = {"student_base", "evaluate-student_base", "student_rl", "evaluate-student_rl"}
    assert {name for name, stage in stages.items() if stage["status"] == "skipped"} == same
    assert {"accuracy", "rewards.format"} <= stages["evaluate-zero"]["metrics"].keys()
    assert DEFINITION.recipe is R1Recipe
