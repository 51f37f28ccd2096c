"""Artifacts in the place of steps: what is then not run, who reads them, what is said when one is missing."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from conftest import ROOT
from planning import Seen, noted
from rich.console import Console

from flows import dpo, r1, rlhf
from flows.recipe import parse, read_recipe
from stages.artifacts import handle
from stages.errors import InputError
from tasks.pipeline import Pipeline
from tasks.report import print_plan

FLOWS: dict[str, tuple[type[Any], Callable[..., None]]] = {
    module.__name__.removeprefix("flows."): (module.DEFINITION.recipe, module.DEFINITION.steps) for module in (rlhf, dpo, r1)
}
IMPLICIT = {"name": "implicit_reward", "args": {"beta": 0.1}}
GRPO: dict[str, Any] = {"ppo": None, "ptx": None, "inputs.ptx": None, "grpo": {"rewards": [{"name": "reward_model"}]}}
BOTH = ("prompts", "preferences")


def planned(flow: str, *inputs: str, **changes: Any) -> Seen:
    """The steps of the tiny recipe with these inputs, each named as its reference; those that are None are left out."""
    values = read_recipe(ROOT / "tests" / "tiny" / f"{flow}.yaml") | {n: v for n, v in changes.items() if "." not in n}
    values["inputs"] |= dict.fromkeys(inputs, "./x")
    for name in (name for name in changes if "." in name):
        values["inputs"][name.removeprefix("inputs.")] = changes[name]
    kind, steps = FLOWS[flow]
    return noted(parse(kind, {name: value for name, value in values.items() if value is not None}, flow), steps)


def given(seen: Seen) -> list[tuple[str, ...]]:
    """The steps in whose place something is given, with what it is."""
    assert {plan.action for _, _, plan in seen.plans} == {"given"}
    return [(step, *(one.name for one in plan.outputs.values())) for step, _, plan in seen.plans]


# What is given; which steps are not run; who reads it by which port.
ENTERED: list[tuple[str, str, set[str], dict[str, str]]] = [
    ("rlhf", "base", {"corpus"}, {"sft": "model", "evaluate-base": "policy", "evaluate-sft": "opponent"}),
    ("rlhf", "corpus_train", {"corpus"}, {"base": "train"}),
    ("rlhf", "demonstrations_train", {"demonstrations"}, {"sft": "train", "reward_model": "demonstrations"}),
    ("rlhf", "sft", {"corpus", "base", "evaluate-base"}, {"samples": "policy", "reward_model": "model", "ppo": "policy"}),
    ("rlhf", "samples", {"samples"}, {"labels": "samples", "reward_model": "samples"}),
    ("rlhf", "reward_model", {"samples", "labels"}, {"ppo": "reward", "evaluate-base": "reward_model"}),
    ("rlhf", "ptx_train", {"ptx"}, {"ppo": "ptx"}),
    ("rlhf", "dpo", set(), {"ppo": "policy", "evaluate-dpo": "policy"}),
    ("dpo", "base", {"corpus"}, {"sft": "model", "evaluate-base": "policy"}),
    ("dpo", "sft", {"corpus", "base", "evaluate-base"}, {"reference": "model", "dpo": "reference", "evaluate-dpo": "opponent"}),
    ("dpo", "demonstrations_train", {"demonstrations"}, {"sft": "train", "spin-samples": "prompts"}),
    ("dpo", "samples", {"samples"}, {"labels": "samples"}),
    ("dpo", "reward_model", set(), {"online-labels": "reward_model", "evaluate-dpo": "reward_model"}),
    ("dpo", "reference_train", {"reference"}, {"dpo": "train_log_probs", "curry": "train_log_probs"}),
    ("r1", "traces", {"traces"}, {"cold_start_data": "samples"}),
    ("r1", "samples", {"samples"}, {"accepted": "samples"}),
    ("r1", "answers", {"answers"}, {"helpful_labels": "samples"}),
    ("r1", "corpus_train", {"corpus"}, {"base": "train", "student_base": "train"}),
    ("r1", "general_demonstrations_train", {"general_demonstrations"}, {"sft_data": "also"}),
]


@pytest.mark.parametrize(("flow", "name", "left_out", "readers"), ENTERED, ids=[f"{flow}-{name}" for flow, name, *_ in ENTERED])
def test_what_is_given_is_read_and_what_only_led_there_is_not_run(
    flow: str, name: str, left_out: set[str], readers: dict[str, str]
) -> None:
    whole, seen = planned(flow), planned(flow, name)
    step = name.removesuffix("_train")
    assert {reader: seen.read[reader][port] for reader, port in readers.items()} == dict.fromkeys(readers, name)
    # A step that is left out needs no config either.
    rlhf_s_own = {"evaluate-dpo"} if name == "dpo" and flow == "rlhf" else set[str]()
    assert (set(whole.read) - set(seen.read), set(seen.read) - set(whole.read)) == (
        left_out | {step} & set(whole.read),
        rlhf_s_own,
    )
    assert given(seen) == [(step, name)]
    unconfigured = planned(flow, name, **({step: None} if step in FLOWS[flow][0].model_fields else {}))
    assert unconfigured.read == seen.read


@pytest.mark.parametrize("flow", ["rlhf", "dpo"])
def test_prepared_datasets_stand_for_what_prepare_or_label_makes(flow: str) -> None:
    parts = [f"{step}_{part}" for step in BOTH for part in ("train", "heldout")]
    seen = planned(flow, *parts, prompts=None, labels=None, samples=None)
    assert not {"prompts", "samples", "labels", "preferences"} & set(seen.read)
    assert given(seen) == [(step, f"{step}_train", f"{step}_heldout") for step in BOTH]
    assert seen.read["demonstrations"]["exclude"] == "prompts_heldout"
    assert seen.read["evaluate-sft"]["prompts"] == "prompts_heldout"
    learnt = seen.read["reward_model"]
    assert (learnt["train"], learnt["heldout"], "samples" in learnt) == ("preferences_train", "preferences_heldout", False)
    assert flow == "dpo" or seen.read["ppo"]["prompts"] == "prompts_train"


def test_samples_that_scale_the_reward_model_are_drawn_though_the_preferences_are_given() -> None:
    parts = "preferences_train", "preferences_heldout"
    read = planned("rlhf", *parts).read
    assert read["reward_model"]["samples"] == "samples.samples"
    assert "labels" not in read
    assert planned("rlhf", *parts, "samples", labels=None, samples=None).read["reward_model"]["samples"] == "samples"
    assert "samples" not in planned("dpo", *parts).read


def test_rl_alone_is_all_that_is_left_when_its_models_are_given() -> None:
    left_out = dict.fromkeys(("corpus", "base", "demonstrations", "sft", "samples", "labels", "reward_model", "ptx"))
    sources = dict.fromkeys(("inputs.model", "inputs.corpus", "inputs.demonstrations", "inputs.ptx"))
    ppo = {"steps": 1}
    seen = planned("rlhf", "sft", "reward_model", **left_out, **sources, ppo=ppo)
    assert list(seen.read) == ["prompts", "evaluate-sft", "ppo", "evaluate-ppo"]
    assert seen.read["evaluate-sft"] == {"policy": "sft", "prompts": "prompts.heldout", "reward_model": "reward_model"}
    models = {"policy": "sft", "reference": "sft", "reward": "reward_model"}
    assert seen.read["ppo"] == models | {"prompts": "prompts.train"}
    with_base = planned("rlhf", "sft", "reward_model", "base", **left_out, **sources, ppo=ppo)
    assert (with_base.read["evaluate-base"]["policy"], with_base.read["evaluate-sft"]["opponent"]) == ("base", "base")


def test_a_model_that_is_a_base_is_measured_beside_an_sft_model_and_random_weights_are_not() -> None:
    assert planned("rlhf", "sft", base=None).read["evaluate-sft"]["opponent"] == "model"
    assert "opponent" not in planned("rlhf", "sft").read["evaluate-sft"]


def test_a_reward_model_that_is_given_is_where_refitting_begins() -> None:
    seen = planned("rlhf", "reward_model", **GRPO, iterations=2, refit=True)
    assert [seen.read[name]["reward_model"] for name in ("grpo", "grpo-2")] == ["reward_model", "reward_model-2.checkpoint"]
    assert seen.read["preferences-2"] == {"source": "labels.train", "also": "labels-2.train"}
    with pytest.raises(InputError, match="refit needs the step reward_model, which it repeats"):
        planned("rlhf", "reward_model", **GRPO, iterations=2, refit=True, reward_model=None)


def test_a_dpo_policy_that_is_given_is_an_implicit_reward_too() -> None:
    seen = planned("rlhf", "dpo", **GRPO | {"grpo": {"rewards": [IMPLICIT]}}, reward_model=None)
    assert (seen.read["grpo"]["preference_model"], seen.read["grpo"]["preference_reference"]) == ("dpo", "sft.checkpoint")
    assert "labels" not in seen.read


def test_a_process_model_that_is_given_needs_no_labels_of_steps() -> None:
    process = GRPO | {"grpo": {"rewards": [{"name": "process_model", "args": {"steps": ";"}}]}}
    with pytest.raises(InputError, match="have both or neither"):
        planned("rlhf", **process)
    # DPO learns from pairs beside it.
    seen = planned("rlhf", "reward_model", **process, dpo={"batch_size": 4})
    assert (seen.read["grpo"]["process_model"], seen.read["dpo"]["train"]) == ("reward_model", "labels.train")


MISSING: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("rlhf", (), {"sft": None}, r"sft is missing: Fine-tunes .* In its place there may be inputs\.sft"),
    ("dpo", (), {"prompts": None}, r"prompts is missing: Prepares .* may be inputs\.prompts_train"),
    ("r1", (), {"prompts": None}, r"prompts is missing: Prepares .* may be inputs\.prompts_train"),
    (
        "rlhf",
        (),
        {"demonstrations": None},
        r"the step sft needs demonstrations: .* or inputs\.demonstrations_train in its place",
    ),
    ("rlhf", (), {"reward_model": None}, r"reward_model is missing: .* may be inputs\.reward_model"),
    ("dpo", (), {"reward_model": None}, r"relabel needs a `reward`, .* or inputs\.reward_model"),
    ("dpo", ("sft",), {"demonstrations": None}, r"spin need the step demonstrations, or inputs\.demonstrations_train"),
    (
        "rlhf",
        ("prompts_train",),
        {},
        "prompts_train is given without prompts_heldout: in the place of the step prompts give both",
    ),
    ("dpo", ("preferences_train",), {}, "preferences_train is given without preferences_heldout"),
    ("rlhf", ("demonstrations_heldout",), {}, "demonstrations_heldout is given without demonstrations_train"),
]


@pytest.mark.parametrize(("flow", "inputs", "changes", "message"), MISSING)
def test_what_is_neither_made_nor_given_is_named(
    flow: str, inputs: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        planned(flow, *inputs, **changes)


def pipeline(from_step: str | None = None) -> Pipeline:
    store: Any = None
    made = handle("model", name="quickstart-sft", version="3", digest="d", uri="models:/m-1")
    return Pipeline("r", store, {"sft": made}, "", only_plan=True, from_step=from_step)


def test_a_plan_says_what_is_given() -> None:
    planning, text = pipeline(), StringIO()
    assert planning.given("base", "sft", {}) is None
    found = planning.given("sft", "sft", {"checkpoint": "sft"})
    assert found is not None
    assert (found["checkpoint"], found["generations"]) == (planning.inputs["sft"], None)
    print_plan(Console(file=text), "r", planning.plans)
    assert "given │ inputs.sft is quickstart-sft/3" in text.getvalue()


def test_a_step_in_whose_place_something_is_given_cannot_be_computed_again() -> None:
    with pytest.raises(
        InputError, match=r"--from sft: inputs\.sft is given in this step's place, so it is not computed; leave"
    ):
        pipeline(from_step="sft").given("sft", "sft", {"checkpoint": "sft"})
