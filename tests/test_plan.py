"""Why a step would run, in words."""

from __future__ import annotations

from typing import Any

from tasks.plan import StepCall, compare

BEFORE: dict[str, Any] = {
    "stage": "sft",
    "version": 1,
    "config": {"epochs": 2.0, "optimizer": {"lr": 0.001}, "rewards": [{"name": "a"}]},
    "inputs": {"train": "d1"},
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**BEFORE, **parts}


def test_equal_identities_have_no_difference() -> None:
    assert compare(BEFORE, changed()) == []


def test_a_nested_field_is_named_with_both_values() -> None:
    config = {**BEFORE["config"], "optimizer": {"lr": 0.002}}
    assert compare(BEFORE, changed(config=config)) == ["optimizer.lr: 0.001 -> 0.002"]


def test_an_input_is_named_without_its_digest() -> None:
    assert compare(BEFORE, changed(inputs={"train": "d2"})) == ["input train changed"]


def test_a_new_input_and_a_new_version() -> None:
    after = changed(inputs={"train": "d1", "heldout": "d3"}, version=2)
    assert compare(BEFORE, after) == ["input heldout changed", "version: 1 -> 2"]


def test_lists_are_compared_whole() -> None:
    config = {**BEFORE["config"], "rewards": []}
    assert compare(BEFORE, changed(config=config)) == ["rewards: [{'name': 'a'}] -> []"]


def test_only_the_checkpoint_has_the_steps_own_name() -> None:
    """A step may make several models: each has a line of versions of its own."""
    call = StepCall(recipe="r", name="rl", stage="ppo", config={}, inputs={}, pipeline="")
    names = {output: call.registered_name(output) for output in call.spec().outputs}
    assert names == {"checkpoint": "r-rl", "critic": "r-rl-critic", "rollouts": "r-rl-rollouts"}
    assert {call.spec().outputs[output] for output in ("checkpoint", "critic")} == {"model"}
