"""What a round's recipe says: which steps read what, for every way to optimise, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
from planning import Seen
from rounding import tiny

from flows.rounds import steps
from flows.rounds_recipe import RoundsRecipe
from stages.artifacts import Dataset, Model
from stages.errors import InputError
from stages.specs.prepare import Slice
from tasks.rounds import Round

DPO: dict[str, Any] = {"ppo": None, "preference": {"steps": 1}}
GRPO: dict[str, Any] = {"ppo": None, "grpo": {"steps": 1, "rewards": [{"name": "reward_model"}]}}
LATER = {"champion": "model", "first": "model", "prompts": "dataset", "train": "dataset", "heldout": "dataset"}


def given(kind: str, name: str) -> Dataset | Model:
    return (Model if kind == "model" else Dataset)(name=name, version="1", digest=name, uri=f"models:/{name}/1")


def noted(recipe: RoundsRecipe, inputs: dict[str, str], number: int = 2) -> Seen:
    """The steps of a round; its inputs by name, of a kind each."""
    handles = {name: given(kind, name) for name, kind in inputs.items()}
    fields = {"champion": "c", "champion_version": None, "stream": "", "start": 48, "count": 16}
    now = Round(recipe="r", number=number, inputs=handles, **fields)  # pyright: ignore[reportArgumentType]
    seen = Seen(handles)
    steps(seen, recipe, now)
    return seen


def test_a_first_round_makes_its_champion_and_takes_what_it_is_given() -> None:
    data = {"corpus": {"rows": 9}, "demonstrations": {"rows": 9}}
    recipe = tiny(**data, base={}, sft={}, inputs=dict.fromkeys(("corpus", "demonstrations", "preferences"), "./x.jsonl"))
    kinds = {"model": "model", "corpus": "dataset", "demonstrations": "dataset", "prompts": "dataset", "preferences": "dataset"}
    seen = noted(recipe, kinds, 1)
    assert seen.read["base"] == {"model": "model", "train": "corpus.train", "heldout": "corpus.heldout"}
    assert seen.read["sft"]["model"] == "base.checkpoint"
    assert seen.read["samples"] == {"policy": "sft.checkpoint", "prompts": "fresh.train"}
    assert seen.read["first_preferences"] == {"source": "preferences", "exclude": "prompts.heldout"}
    parts = {"source": "first_preferences.train", "also": "labels.train", "exclude": "heldout_preferences.train"}
    assert seen.read["preferences"] == parts
    assert seen.read["reward_model"] == {
        "model": "sft.checkpoint",
        "train": "preferences.train",
        "heldout": "heldout_preferences.train",
        "samples": "samples.samples",
        "demonstrations": "demonstrations.train",
    }
    assert seen.made["fresh"][1].slice == Slice(seed=3, start=48, count=16)


def test_ppo_reads_the_rounds_reward_model_and_prompts() -> None:
    seen = noted(tiny(), LATER)
    assert seen.read["ppo"] == {
        "policy": "champion",
        "reference": "champion",
        "reward": "reward_model.checkpoint",
        "prompts": "fresh.train",
    }
    measured = {"prompts": "prompts.heldout", "reward_model": "reward_model.checkpoint"}
    assert seen.read["evaluate-champion"] == {"policy": "champion", **measured}
    against = {"policy": "ppo.checkpoint", "reference": "champion", "opponent": "champion"}
    assert seen.read["evaluate-candidate"] == against | measured
    assert [seen.made[name][1].seed for name in ("samples", "labels", "reward_model", "ppo")] == [4] * 4
    assert [seen.made[name][1].seed for name in ("prompts", "evaluate-champion", "evaluate-candidate")] == [3] * 3


def test_the_reference_may_be_the_first_model() -> None:
    seen = noted(tiny(reference="first"), LATER)
    assert seen.read["ppo"]["reference"] == seen.read["evaluate-candidate"]["reference"] == "first"
    assert seen.read["evaluate-champion"]["reference"] == "first"
    assert seen.read["evaluate-candidate"]["opponent"] == "champion"


@pytest.mark.parametrize(
    ("start", "more", "model"),
    [
        ("champion", {}, "champion"),
        ("first", {}, "first"),
        ("last", {"last_reward_model": "model"}, "last_reward_model"),
        ("last", {"reward_model": "model"}, "reward_model"),
        ("last", {}, "champion"),
    ],
)
def test_where_a_reward_model_starts(start: str, more: dict[str, str], model: str) -> None:
    assert noted(tiny(reward_model_from=start), LATER | more).read["reward_model"]["model"] == model


def test_grpo_and_preference_take_ppos_place() -> None:
    seen = noted(tiny(**GRPO), LATER)
    read = {"policy": "champion", "reference": "champion", "prompts": "fresh.train", "reward_model": "reward_model.checkpoint"}
    assert seen.read["grpo"] == read
    assert seen.read["evaluate-candidate"]["policy"] == "grpo.checkpoint"
    verified = noted(tiny(ppo=None, grpo={"rewards": [{"name": "answer"}]}, reward_model=None), LATER)
    assert (
        "reward_model" not in verified.read["grpo"].keys() | verified.read["evaluate-candidate"].keys() | verified.read.keys()
    )
    for learn_from, pairs in (("round", "labels.train"), ("all", "preferences.train")):
        seen = noted(tiny(**DPO, learn_from=learn_from), LATER)
        read = {"policy": "champion", "reference": "champion", "train": pairs, "heldout": "heldout_preferences.train"}
        assert seen.read["preference"] == read


def test_a_reward_model_that_is_given_labels_and_rewards() -> None:
    recipe = tiny(reward_model=None, labels={"heldout": 0.2}, inputs={"reward_model": "./rm"})
    seen = noted(recipe, LATER | {"reward_model": "model"})
    assert seen.read["labels"] == {"samples": "samples.samples", "reward_model": "reward_model"}
    assert seen.read["ppo"]["reward"] == seen.read["evaluate-candidate"]["reward_model"] == "reward_model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": None}, "has one of the steps ppo, grpo and preference"),
        ({"preference": {}}, "has one of the steps ppo, grpo and preference"),
        ({"labels": None}, "either the step labels makes the preferences, or people do by the step questions"),
        ({"questions": {}}, "either the step labels makes the preferences, or people do by the step questions"),
        ({"labels": {"form": "steps", "reward": {"name": "chain_sum"}}}, r"labels\.form: steps is for process models"),
        ({"labels": {}}, "labels need a `reward`, or the input reward_model"),
        ({"samples": {"endpoint": {"model": "m", "url": "http://x"}}}, r"samples\.endpoint: a round samples its champion"),
        ({"prompts": {"rows": 9}}, r"prompts\.heldout: champion and candidate are measured"),
        ({"sft": {}}, "the step sft needs the step demonstrations"),
        ({"base": {}}, "the step base needs the step corpus, and the step sft"),
        ({"reward_model": None}, "ppo, or a reward of grpo, reads a reward model"),
        (GRPO | {"reward_model": None}, "ppo, or a reward of grpo, reads a reward model"),
        (DPO | {"reward_model": None, "evaluate": {}}, r"nothing decides who wins: set evaluate\.judge"),
        (GRPO | {"grpo": {"rewards": [{"name": "process_model"}]}}, "rounds make no model for the reward process_model"),
        ({"inputs": {"promts": "./x"}}, "unknown key inputs.promts; did you mean prompts"),
        ({"gate": {"max_kll": 1}}, r"unknown key gate\.max_kll; did you mean max_kl"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny(**changes)


def test_names_that_follow_from_others() -> None:
    assert (tiny().name_of_champion, tiny(champion="best").name_of_champion) == ("tiny-rounds-champion", "best")
    assert tiny().stream.seed == 3
    metrics = [tiny().main, tiny(evaluate={"rewards": [{"name": "length"}]}).main, tiny(evaluate={}).main]
    assert metrics == ["accuracy", "rewards.length", "reward"]
