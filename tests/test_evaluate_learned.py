"""Evaluation by a learned reward model, against transformers' own classifier; who wins by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import evaluating
import numpy as np
import pytest
import torch
from conftest import request_for
from evaluating import CONFIG, Rows, generations, mean_over_prompts, metrics
from transformers import AutoModelForSequenceClassification

from stages.data.chat import encode_prompt
from stages.errors import InputError
from stages.evaluate import learned_rewards
from stages.models.load import load_policy, save_policy
from stages.models.reward import load_reward_model, save_reward_model
from stages.request import run_stage
from stages.rollouts.sample import Sample, sample_rows
from stages.specs.common import Dtype, Sampling
from stages.specs.evaluate import EvaluateConfig

registered = evaluating.registered
prompts = evaluating.prompts
other = evaluating.other
UNVERIFIED = CONFIG | {"verifier": None}


def drawn_from(folder: Path, rows: Rows, dtype: Dtype = "float32") -> list[Sample]:
    return sample_rows(load_policy(folder, dtype), rows[:12], Sampling(max_new_tokens=6), seed=0, samples=4)[0]


@torch.no_grad()
def plain_rewards(folder: Path, samples: Sequence[Sample]) -> list[float]:
    """The oracle: transformers' own classifier on each sample's tokens alone, (raw + 3) * -0.5."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    sequences = [torch.tensor([[*one.prompt_ids, *one.completion.ids]]) for one in samples]
    return [(float(model(input_ids=ids_1T).logits[0, 0]) + 3) * -0.5 for ids_1T in sequences]


def test_the_learned_reward_is_of_the_sampled_tokens(
    init_folder: Path, reward_model: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    chosen = UNVERIFIED | {"runtime": CONFIG["runtime"] | {"micro_batch_tokens": 60}}
    inputs = {"policy": init_folder, "prompts": prompts, "reward_model": reward_model}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, **inputs))
    drawn = drawn_from(init_folder, chain_rows)
    assert {one.completion.finish for one in drawn} == {"stop", "length"}
    records, found = generations(run), metrics(run)
    assert [record["reward"] for record in records] == pytest.approx(plain_rewards(reward_model, drawn), abs=1e-5)
    assert found["reward"] == pytest.approx(mean_over_prompts(records, "reward"))
    assert found["reward_low"] < found["reward"] < found["reward_high"]
    assert not {"win_rate", "reward_missing", "accuracy"} & set(found)


def test_without_a_judge_the_reward_model_decides_who_wins(
    init_folder: Path, other: Path, reward_model: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    inputs = {"policy": init_folder, "prompts": prompts, "opponent": other, "reward_model": reward_model}
    run = run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs))
    ours, theirs = (plain_rewards(reward_model, drawn_from(folder, chain_rows)) for folder in (init_folder, other))
    expected = [1.0 if a > b + 1e-5 else 0.0 if a < b - 1e-5 else 0.5 for a, b in zip(ours, theirs, strict=True)]
    assert [record["win_rate"] for record in generations(run)] == expected
    assert metrics(run)["win_rate"] == pytest.approx(np.mean(expected))
    assert {0.0, 1.0} <= set(expected)


def test_a_judge_stays_in_charge_beside_a_reward_model(
    init_folder: Path, other: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    inputs = {"policy": init_folder, "prompts": prompts, "opponent": other}
    judged = UNVERIFIED | {"judge": {"name": "size"}}
    alone = run_stage(request_for("evaluate", tmp_path / "alone", judged, **inputs))
    beside = run_stage(request_for("evaluate", tmp_path / "beside", judged, **inputs, reward_model=reward_model))
    learned = run_stage(request_for("evaluate", tmp_path / "learned", UNVERIFIED, **inputs, reward_model=reward_model))
    assert metrics(beside).items() >= metrics(alone).items()
    assert metrics(beside)["reward"] == metrics(learned)["reward"]
    assert metrics(beside)["win_rate"] != metrics(learned)["win_rate"]
    assert [list(record) for record in generations(beside)[:1]] != [list(record) for record in generations(alone)[:1]]


def test_equal_completions_tie_whatever_batches_they_are_scored_in(
    init_folder: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    inputs = {"policy": init_folder, "prompts": prompts, "opponent": init_folder, "reward_model": reward_model}
    found = metrics(run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs)))
    assert [found[f"win_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]


def test_a_sample_that_comes_twice_is_scored_once(reward_model: Path, chain_rows: Rows, init_folder: Path) -> None:
    learned, drawn = load_reward_model(reward_model), drawn_from(init_folder, chain_rows)
    config = EvaluateConfig.model_validate(CONFIG | {"runtime": {"micro_batch_tokens": 90}})
    twice = learned_rewards(config, learned, [*drawn, *drawn[::-1]])
    assert twice == [*twice[:48], *twice[:48][::-1]]
    assert twice[:48] == learned_rewards(config, learned, drawn)


def test_what_does_not_fit_into_the_reward_model_has_no_reward(
    init_folder: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    file = reward_model / "config.json"
    inputs = {"policy": init_folder, "prompts": prompts, "reward_model": reward_model}
    whole = run_stage(request_for("evaluate", tmp_path / "whole", UNVERIFIED, **inputs))
    policy = load_policy(init_folder)
    lengths = [len(encode_prompt(policy.tokenizer, r["prompt"])) + r["length"] for r in generations(whole)]
    limit = sorted(lengths)[len(lengths) // 2]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": limit}))
    run = run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs))
    found, rewards = metrics(run), [record["reward"] for record in generations(run)]
    assert [reward is None for reward in rewards] == [length > limit for length in lengths]
    assert found["reward_missing"] == sum(length > limit for length in lengths) > 0
    assert found["reward"] == pytest.approx(mean_over_prompts(generations(run), "reward"))


def test_a_reward_model_that_reads_other_tokens_is_refused(
    init_folder: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    learned = load_reward_model(reward_model)
    learned.tokenizer.add_tokens(["<new>"])
    save_reward_model(learned, tmp_path / "foreign")
    inputs = {"policy": init_folder, "prompts": prompts, "reward_model": tmp_path / "foreign"}
    with pytest.raises(InputError, match="the reward_model's tokenizer differs from the policy's"):
        run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs))
    assert not (tmp_path / "run" / "outputs").exists()


def test_an_opponent_that_the_reward_model_cannot_read_needs_a_judge(
    init_folder: Path, other: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    foreign = load_policy(other)
    foreign.tokenizer.add_tokens(["<new>"])
    save_policy(foreign, tmp_path / "foreign")
    inputs = {"policy": init_folder, "prompts": prompts, "opponent": tmp_path / "foreign", "reward_model": reward_model}
    with pytest.raises(InputError, match=r"the opponent's tokenizer differs from the reward model's.*set `judge`"):
        run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs))
    judged = UNVERIFIED | {"judge": {"name": "size"}}
    found = metrics(run_stage(request_for("evaluate", tmp_path / "judged", judged, **inputs)))
    assert {"win_rate", "reward"} <= set(found)


def test_a_policy_is_no_reward_model(init_folder: Path, other: Path, prompts: Path, tmp_path: Path) -> None:
    inputs = {"policy": init_folder, "prompts": prompts, "reward_model": other}
    with pytest.raises(InputError, match="other: not a reward model"):
        run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED, **inputs))


def test_rewards_of_bfloat16_weights_differ_but_little(
    init_folder: Path, reward_model: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    inputs = {"policy": init_folder, "prompts": prompts, "reward_model": reward_model}
    run = run_stage(request_for("evaluate", tmp_path / "run", UNVERIFIED | {"dtype": "bfloat16"}, **inputs))
    rough = [record["reward"] for record in generations(run)]
    exact = plain_rewards(reward_model, drawn_from(init_folder, chain_rows, "bfloat16"))
    assert rough == pytest.approx(exact, abs=0.05)
    assert rough != pytest.approx(exact, abs=1e-4)
