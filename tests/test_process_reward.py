"""The reward `process_model`, against transformers' own scores of truncated prefixes, and in the stages that take it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import request_for
from pydantic import ValidationError
from test_learned_reward import CUT, PROMPT, ROW, Oracle, part

from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.models.reward import RewardModel, new_reward_model, save_reward_model
from stages.request import run_stage
from stages.rewards import process as module
from stages.rewards import score
from stages.rewards.base import Score
from stages.rewards.learned import load_judges, model_arguments
from stages.rewards.mix import Mixture
from stages.specs.common import ProcessArgs, RewardRef, WeightedReward
from stages.specs.evaluate import EvaluateConfig

CPU = torch.device("cpu")
SUMS = ";|</think>"
TEXT = "<think>12+3=15;15-9=6</think><answer>6</answer>"


def saved(init_folder: Path, folder: Path, separator: str | None) -> Path:
    model = new_reward_model(init_folder, seed=1)
    # So that probabilities are far apart.
    model.model.score.weight.data *= 8  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    model.calibrate(3.0, -0.5)
    if separator is not None:
        model.rate_steps(separator)
    save_reward_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(init_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(init_folder, tmp_path_factory.mktemp("models") / "process", ";")


@pytest.fixture(scope="module")
def bare(init_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of steps with nothing between them."""
    return saved(init_folder, tmp_path_factory.mktemp("models") / "bare", "")


@pytest.fixture(scope="module")
def outcome(init_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(init_folder, tmp_path_factory.mktemp("models") / "outcome", None)


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return load_judges([part("process_model")], {"process_model": folder}, CPU)["process_model"]


def rate(model: RewardModel, texts: list[str], rows: list[dict[str, Any]] | None = None, **args: Any) -> list[Score | None]:
    return score("process_model", texts, rows or [ROW] * len(texts), model=model, **args)


@torch.no_grad()
def expected(oracle: Oracle, marked: str, eos: bool, prompt: Any = PROMPT) -> list[float]:
    """The probabilities of a text's steps, each with a | behind it: transformers' scores of prefixes, the whole with EOS."""
    steps, found = marked.split("|")[:-1], []
    for k in range(len(steps)):
        last = k == len(steps) - 1
        ids = oracle.tokens("".join(steps[: k + 1]), eos and last, prompt)
        found.append(float(torch.sigmoid(oracle.model(input_ids=torch.tensor([ids])).logits[0, 0])))
    return found


CASES: dict[str, tuple[str | None, str]] = {
    "the model's separator": (None, "<think>12+3=15;|15-9=6</think><answer>6</answer>|"),
    "the separator twice": (None, "1;;|2;|3|"),
    "a pattern": (SUMS, "<think>12+3=15;|15-9=6</think>|<answer>6</answer>|"),
    "one step": (None, "6|"),
    "no text": (None, "|"),
    "the separator last": (None, "1;|2;|"),
}


@pytest.mark.parametrize(("steps", "marked"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("row", [ROW, CUT, ROW | {"prompt": "12+3-9"}])
def test_steps_are_rated_where_they_end(folder: Path, model: RewardModel, steps: str | None, marked: str, row: Any) -> None:
    text = marked.replace("|", "")
    if row is CUT and not text:
        return  # no token at all: see below
    oracle = Oracle(folder, model.tokenizer)
    wanted = expected(oracle, marked, row is not CUT, row["prompt"])
    [one] = rate(model, [text], [row], steps=steps)
    assert one is not None
    assert one.step_scores == pytest.approx(wanted, abs=1e-5)
    ends = [max(0, len("".join(marked.split("|")[: k + 1])) - 1) for k in range(len(wanted))]
    assert one.step_ends == ends
    assert one.total == pytest.approx(min(wanted), abs=1e-5)


def test_the_total_is_reduced_as_asked(folder: Path, model: RewardModel) -> None:
    scores = expected(Oracle(folder, model.tokenizer), CASES["a pattern"][1], True)
    assert len({round(one, 2) for one in scores}) == 3
    reduced = {"min": min(scores), "product": math.prod(scores), "mean": sum(scores) / 3, "last": scores[-1]}
    for name, value in reduced.items():
        [one] = rate(model, [TEXT], steps=SUMS, reduce=name)
        assert one is not None
        assert one.total == pytest.approx(value, abs=1e-5)


def test_batches_change_nothing(model: RewardModel) -> None:
    texts = [TEXT, "6", "1;2;3;4", "", TEXT, "<think>12+3"] * 3
    alone = [rate(model, [text])[0] for text in texts]
    for max_tokens in (1, 100, 100_000):
        for one, same in zip(alone, rate(model, texts, max_tokens=max_tokens), strict=True):
            assert one is not None
            assert same is not None
            assert same.step_ends == one.step_ends
            assert same.step_scores == pytest.approx(one.step_scores, abs=1e-5)
    assert rate(model, []) == []


def test_what_cannot_be_read_has_no_reward(folder: Path, model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(folder, model.tokenizer)
    room = model.context - len(oracle.tokens("", True))
    fits = "+1" * room
    texts = [fits, fits + "+1", fits + "+1", "hell;", "", "1;2"]
    rows = [ROW, ROW, CUT, ROW, CUT, ROW]
    # With EOS one token more than without; an unknown word, in one step; what was cut off before its first token.
    found = rate(model, texts, rows)
    assert [one is None for one in found] == [False, True, False, False, True, False]
    assert found[3] is not None
    assert found[3].step_ends == [4]
    assert found[3].step_scores == pytest.approx(expected(oracle, "hell;|", True), abs=1e-5)
    monkeypatch.setattr(module, "raw_step_scores", lambda *_: [np.array([0.0, np.nan]), np.array([0.0])])
    assert rate(model, ["1;2", "1"]) == [None, Score(0.5, step_scores=[0.5], step_ends=[0])]


# What is checked before anything is sampled.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"steps": "("}, "no regular expression"),
        ({"steps": "x*"}, "also matches an empty text, so a step would end at every character"),
        ({"steps": ""}, "at least 1 character"),
        ({"reduce": "max"}, "'min', 'product', 'mean' or 'last'"),
        ({"step": ";"}, "Extra inputs"),
    ],
)
def test_arguments_are_checked_with_the_config(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WeightedReward(name="process_model", args=args)


def test_what_it_is_told_is_identity() -> None:
    found = [part("process_model", args=args).identity()["args"] for args in ({}, {"reduce": "min"})]
    assert found[0] == found[1] == {"steps": None, "reduce": "min"}
    assert ProcessArgs().reduce == "min"


def test_the_wrong_kind_of_model_is_refused(folder: Path, outcome: Path) -> None:
    with pytest.raises(InputError, match="outcome: a reward model of whole completions, where a process reward model"):
        load_judges([part("process_model")], {"process_model": outcome}, CPU)
    for name in ("reward_model", "safety_model"):
        with pytest.raises(InputError, match="process: a process reward model, which rates the steps of a completion"):
            load_judges([part(name)], {name: folder}, CPU)
    with pytest.raises(InputError, match="the reward 'process_model' reads a model, which is to be given as the input"):
        load_judges([part("process_model")], {"process_model": None}, CPU)


def test_steps_with_nothing_between_them_need_a_pattern(bare: Path) -> None:
    given = {"process_model": bare}
    for parts in ([part("process_model")], [part("process_model", args={"steps": ";"}), part("process_model", label="b")]):
        with pytest.raises(InputError, match="the reward 'process_model' needs `steps` in its args"):
            load_judges(parts, given, CPU)
    parts = [part("process_model", args={"steps": ";"})]
    [found] = Mixture(parts, model_arguments(load_judges(parts, given, CPU), 99))(["1;2"], [ROW])
    assert [end for end, _ in found.steps] == [1, 2]


def test_only_where_a_model_is_an_input(folder: Path) -> None:
    for place in ({"verifier": {"name": "process_model"}}, {"judge": {"name": "process_model"}}):
        with pytest.raises(ValidationError, match="'process_model' is a part of a mixed reward"):
            EvaluateConfig.model_validate(place)
    with pytest.raises(ValidationError, match="'reward_model' is a part of a mixed reward"):
        EvaluateConfig.model_validate({"rewards": [{"name": "reward_model"}]})
    assert EvaluateConfig(rewards=[RewardRef(name="answer")]).rewards[0].name == "answer"  # pyright: ignore[reportArgumentType]


# In stages.

RUNTIME = {"device": "cpu", "threads": 1}
PARTS = [{"name": "process_model", "args": {"steps": SUMS}, "weight": 2.0}]
SAMPLING = {"max_new_tokens": 8}


@pytest.mark.parametrize("stage", ["grpo", "sample", "rejection", "evaluate"])
def test_stages_refuse_before_anything_is_sampled(
    stage: str, init_folder: Path, outcome: Path, bare: Path, chain_rows: Any, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row | {"length": 3, "finish": "stop"} for row in chain_rows[:4]]
    given = {"samples": dataset(rows)} if stage == "rejection" else {"policy": init_folder, "prompts": dataset(rows)}
    configs = {
        "grpo": {"rewards": PARTS},
        "sample": {"best_of": {"rewards": PARTS}},
        "rejection": {"criteria": PARTS},
        "evaluate": {"rewards": [{"name": "process_model", "args": {"steps": SUMS}}]},
    }
    config: dict[str, Any] = configs[stage] | {"runtime": RUNTIME}
    for inputs, message in (
        ({}, "is to be given as the input"),
        ({"process_model": outcome}, "process reward model is needed"),
    ):
        request = request_for(stage, tmp_path / f"{stage} {len(inputs)}", config, **given, **inputs)
        with pytest.raises(InputError, match=message):
            run_stage(request)
        assert not (request.folder / "events.jsonl").exists() or "progress" not in (request.folder / "events.jsonl").read_text()
    done = run_stage(request_for(stage, tmp_path / "done", SMALL[stage] | config, **given, process_model=bare))
    [first, *_] = list(read_rows(done.folder / "outputs" / OUTPUT[stage]))
    assert 0 < first["rewards.process_model"] < 1


SMALL: dict[str, dict[str, Any]] = {
    "grpo": {"steps": 1, "prompts": 2, "group": 2, "sampling": SAMPLING, "supervision": "process"},
    "sample": {"samples": 2, "sampling": SAMPLING},
    "rejection": {"per_prompt": 1},
    "evaluate": {"sampling": SAMPLING, "bootstrap": 100},
}
OUTPUT = {"grpo": "rollouts", "sample": "samples", "rejection": "train", "evaluate": "generations"}


def test_evaluate_rates_how_completions_ended(
    init_folder: Path, bare: Path, chain_rows: Any, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"rewards": [{"name": "process_model", "args": {"steps": SUMS, "reduce": "last"}}], "sampling": SAMPLING}
    inputs = {"policy": init_folder, "prompts": dataset(chain_rows[:24]), "process_model": bare}
    run = run_stage(request_for("evaluate", tmp_path / "run", config | {"bootstrap": 100, "runtime": RUNTIME}, **inputs))
    model = load_judges([part("process_model", args={"steps": SUMS})], {"process_model": bare}, CPU)["process_model"]
    records = list(read_rows(run.folder / "outputs" / "generations"))
    wanted = rate(model, [row["completion"] for row in records], records, steps=SUMS, reduce="last")
    assert {row["finish"] for row in records} == {"stop", "length"}
    assert [row["rewards.process_model"] for row in records] == [one and pytest.approx(one.total, abs=1e-5) for one in wanted]


def test_no_stage_takes_it_as_its_reward_model(
    init_folder: Path, folder: Path, chain_rows: Any, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = dataset(chain_rows[:4])
    requests = {
        "ppo": ({"steps": 1}, {"policy": init_folder, "reward": folder, "prompts": prompts}),
        "evaluate": ({}, {"policy": init_folder, "reward_model": folder, "prompts": prompts}),
        "label": ({}, {"reward_model": folder, "samples": prompts}),
    }
    for stage, (config, inputs) in requests.items():
        with pytest.raises(InputError, match=r"^process: a process reward model, .* this one to the reward `process_model`"):
            run_stage(request_for(stage, tmp_path / stage, config | {"runtime": RUNTIME}, **inputs))
