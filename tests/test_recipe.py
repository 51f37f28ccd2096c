"""Recipes: what is read, what `--set` changes, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from flows.dpo import DpoRecipe
from flows.r1 import R1Recipe
from flows.recipe import apply, parse, read_recipe
from flows.rlhf import RlhfRecipe
from flows.rounds_recipe import RoundsRecipe
from stages.errors import InputError

TINY = ROOT / "tests" / "tiny" / "rlhf.yaml"


def tiny(*settings: str, seed: int | None = None) -> Any:
    return parse(RlhfRecipe, read_recipe(TINY, settings, seed), "tiny.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    values = read_recipe(path)
    assert parse(
        {"rlhf": RlhfRecipe, "dpo": DpoRecipe, "r1": R1Recipe, "rounds": RoundsRecipe}[values["flow"]], values, str(path)
    ).name == path.stem.replace(".", "-")


@pytest.mark.parametrize("name", ["hh-smollm2", "hh-smollm2-small"])
def test_the_hh_recipes_hold_out_the_same_prompts_in_all_three_forms(name: str) -> None:
    recipe = parse(RlhfRecipe, read_recipe(ROOT / "configs" / f"{name}.yaml"), name)
    forms = [recipe.demonstrations, recipe.prompts, recipe.preferences]
    assert [(one.form, one.split_by) for one in forms if one] == [
        ("demonstrations", "prompt"),
        ("prompts", "prompt"),
        ("as_given", "prompt"),
    ]
    assert len({(one.heldout, one.seed, one.config, one.split) for one in forms if one}) == 1


def test_the_recipes_seed_reaches_every_step_that_sets_none() -> None:
    assert tiny().sft.seed == 3
    recipe = tiny("sft.seed=9", seed=5)
    assert (recipe.seed, recipe.sft.seed, recipe.evaluate.seed, recipe.prompts.seed) == (5, 9, 5, 5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sft.optimizer.lr=1e-4", 1e-4), ("sft.optimizer.lr=0.5", 0.5), ("sft.optimizer.lr=3", 3.0)],
)
def test_set_reads_numbers(setting: str, value: float) -> None:
    assert tiny(setting).sft.optimizer.lr == value


def test_set_reads_other_values() -> None:
    values: dict[str, Any] = {}
    for setting in ("a.b=true", "a.c=null", "a.d=[1, 2]", "a.e=text", "f=", "a.g=1e5x"):
        apply(values, setting)
    assert values == {"a": {"b": True, "c": None, "d": [1, 2], "e": "text", "g": "1e5x"}, "f": None}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stf.epochs=3", r"tiny.yaml: unknown key stf; did you mean sft\?"),
        ("sft.optimiser.lr=3", r"unknown key sft.optimiser; did you mean optimizer\?"),
        ("sft.optimizer.learning=3", r"unknown key sft.optimizer.learning"),
        ("sft.batch_size=0", r"sft.batch_size: .*greater than or equal to 1 \(it is 0\)"),
        ("sft.loss_on=words", r"sft.loss_on: .*'completion' or 'all'"),
        ("labels.form=steps", r"labels: form: steps needs a `reward` that rates steps, .* which are for comparisons$"),
        ("evaluate.verifier.name=anser", r"no reward is named 'anser'; there are answer"),
        ("inputs.promts=./x", r"unknown key inputs.promts; did you mean prompts\?"),
        ("name=a/b", r"name: .*pattern"),
    ],
)
def test_what_is_refused(setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny(setting)


def test_every_problem_gets_its_line() -> None:
    with pytest.raises(InputError) as raised:
        tiny("sft.batch_size=0", "stf=1")
    assert len(str(raised.value).splitlines()) == 2


def test_a_missing_step_is_named() -> None:
    values = read_recipe(TINY)
    del values["sft"]
    with pytest.raises(InputError, match="sft is missing"):
        parse(RlhfRecipe, values, "x")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such recipe; did you mean .*rlhf.yaml"):
        read_recipe(TINY.with_name("rlfh.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="a mapping with a key `flow`"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match="not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match=r"step\.field=value"):
        read_recipe(TINY, ["sft.epochs"])
    with pytest.raises(InputError, match="seed is a value"):
        read_recipe(TINY, ["seed.x=1"])


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("flow: rlhf\nname: below\nseed: 4\nsft: {epochs: 2, optimizer: {lr: 1, eps: 2}}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "above.yaml").write_text(
        "extends: ../below.yaml\nsft: {optimizer: {lr: 3}, steps: 5}\nppo: {steps: 1}\n"
    )
    found = read_recipe(tmp_path / "more" / "above.yaml", ["sft.epochs=9"])
    assert found == {
        "flow": "rlhf",
        "name": "above",
        "seed": 4,
        "sft": {"epochs": 9, "optimizer": {"lr": 3, "eps": 2}, "steps": 5},
        "ppo": {"steps": 1},
    }


def test_extending_nothing_or_oneself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: two.yaml\n")
    with pytest.raises(InputError, match=r"two\.yaml: no such recipe; did you mean"):
        read_recipe(tmp_path / "one.yaml")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\n")
    with pytest.raises(InputError, match=r"extends itself, by way of one\.yaml, two\.yaml"):
        read_recipe(tmp_path / "one.yaml")
