"""Evaluation: means and intervals over prompts, win rates with ties, KL, pass@k, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import request_for
from transformers import AutoModelForSequenceClassification

from stages.artifacts import sha256_file
from stages.data.chat import encode_prompt
from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.evaluate import by_prompt, learned_rewards, wins
from stages.models.load import load_policy, save_policy
from stages.models.reward import load_reward_model, new_reward_model, save_reward_model
from stages.request import run_stage
from stages.rewards import REWARDS, RewardEntry, Score
from stages.rollouts.engine import Completion
from stages.rollouts.sample import Sample, sample_rows
from stages.run import Run
from stages.specs.common import Dtype, Sampling
from stages.specs.evaluate import EvaluateConfig

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
Scores = list[Score | None]


# Rewards that a random model does not fail altogether. They are registered under their own names below.


def even(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    """1 for a completion of an even number of characters."""
    return [Score(1.0 - len(text) % 2) for text in completions]


def size(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], least: int = 0) -> Scores:
    """The number of characters; none below `least`."""
    return [Score(float(len(text))) if len(text) >= least else None for text in completions]


@pytest.fixture(autouse=True)
def _rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("even", "size"):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"test_evaluate:{name}", version=1))


CONFIG: dict[str, Any] = {
    "prompts": 12,
    "samples": 4,
    "sampling": {"max_new_tokens": 6},
    "verifier": {"name": "even"},
    "bootstrap": 200,
    "runtime": {"device": "cpu", "threads": 1, "generation_batch": 7},
}


def metrics(run: Run) -> dict[str, float]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    [found] = [event["metrics"] for event in lines if event["event"] == "metrics"]
    return found


def generations(run: Run) -> Rows:
    return list(read_rows(run.folder / "outputs" / "generations"))


def mean_over_prompts(records: Rows, column: str, reduce: Callable[[list[float]], float] = np.mean) -> float:  # pyright: ignore[reportArgumentType]
    groups = [[r[column] for r in group if r[column] is not None] for _, group in groupby(records, lambda r: r["id"])]
    return float(np.mean([reduce(group) for group in groups if group]))


def sample(row: str, number: int = 0) -> Sample:
    return Sample({"id": row, "problem": "1+1"}, number, [1], Completion([2], [0.0], "stop"), "")


# The numbers.


def test_numbers_are_grouped_by_prompt_and_missing_ones_left_out() -> None:
    samples = [sample("a"), sample("b"), sample("a", 1), sample("c"), sample("b", 1)]
    assert by_prompt(samples, [1.0, 2.0, 3.0, None, None]) == [[1.0, 3.0], [2.0]]


def test_wins_ties_and_missing_rivals() -> None:
    ours = [sample("a"), sample("a", 1), sample("b"), sample("c"), sample("d")]
    theirs = [sample("b"), sample("a", 1), sample("a"), sample("d")]
    assert wins(ours, theirs, [3.0, 1.0, 2.0, 9.0, None], [2.0, 4.0, 2.0, 1.0]) == [1.0, 0.0, 0.5, None, None]
    assert wins(ours[:1], [sample("a")], [3.0], [None]) == [None]


# The stage.


@pytest.fixture
def prompts(chain_rows: Rows, dataset: Make) -> Path:
    return dataset([{n: row[n] for n in ("id", "prompt", "problem", "answer")} for row in chain_rows], "prompts")


@pytest.fixture
def other(init_folder: Path, tmp_path: Path) -> Path:
    """Another model than the init folder's: its weights come from another seed."""
    save_policy(load_policy(init_folder, seed=5), tmp_path / "other")
    return tmp_path / "other"


def test_every_generation_is_written_with_its_rewards(
    init_folder: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    chosen = CONFIG | {"rewards": [{"name": "size"}, {"name": "chain_sum"}]}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts))
    records, found = generations(run), metrics(run)
    assert [(r["id"], r["sample"]) for r in records] == [(row["id"], k) for row in chain_rows[:12] for k in range(4)]
    policy = load_policy(init_folder)
    drawn, _ = sample_rows(policy, chain_rows[:12], Sampling(max_new_tokens=6), seed=0, samples=4)
    for record, one in zip(records, drawn, strict=True):
        assert record["completion"] == one.text
        assert record["accuracy"] == 1.0 - len(one.text) % 2
        assert record["rewards.size"] == len(one.text)
        assert record["rewards.chain_sum"] <= 0
        assert (record["length"], record["finish"]) == (len(one.completion.ids), one.completion.finish)
        assert type(record["length"]) is int
        assert (record["policy"], record["prompt"], record["answer"]) == ("policy", one.row["prompt"], one.row["answer"])
    assert len({record["completion"] for record in records}) > 40

    for column in ("accuracy", "rewards.size", "rewards.chain_sum", "length"):
        assert found[column] == pytest.approx(mean_over_prompts(records, column))
        assert found[f"{column}_low"] <= found[column] <= found[f"{column}_high"]
    assert 0 < found["accuracy"] < 1
    assert found["truncated"] == sum(r["finish"] == "length" for r in records) / 48
    assert found["prompts_dropped"] == 0
    assert not any(name.endswith("_missing") for name in found)


def test_pass_at_k_asks_for_one_right_sample_of_a_prompt(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    run = run_stage(request_for("evaluate", tmp_path / "run", CONFIG, policy=init_folder, prompts=prompts))
    records, found = generations(run), metrics(run)
    assert found["pass_at_4"] == mean_over_prompts(records, "accuracy", max)
    assert found["pass_at_4"] > found["accuracy"]
    single = CONFIG | {"samples": 1}
    alone = run_stage(request_for("evaluate", tmp_path / "alone", single, policy=init_folder, prompts=prompts))
    assert not any(name.startswith("pass_at") for name in metrics(alone))
    assert metrics(alone)["accuracy"] == sum(r["accuracy"] for r in records if r["sample"] == 0) / 12


def test_the_model_itself_is_at_no_distance_and_even(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = CONFIG | {"judge": {"name": "size"}}
    same = {"reference": init_folder, "opponent": init_folder}
    found = metrics(run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts, **same)))
    assert [found[f"kl{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert [found[f"win_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]


def test_kl_is_the_difference_of_log_likelihoods(
    init_folder: Path, other: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    chosen = CONFIG | {"runtime": CONFIG["runtime"] | {"micro_batch_tokens": 60}}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts, reference=other))
    policy, reference = load_policy(init_folder), load_policy(other)
    drawn, _ = sample_rows(policy, chain_rows[:12], Sampling(max_new_tokens=6), seed=0, samples=4)
    records = generations(run)
    for record, one in zip(records, drawn, strict=True):
        prompt = encode_prompt(policy.tokenizer, one.row["prompt"])
        ids_T = torch.tensor([*prompt, *one.completion.ids])
        sums = []
        for model in (policy.model.eval(), reference.model.eval()):
            with torch.no_grad():
                logp_TV = model(input_ids=ids_T[None]).logits[0].log_softmax(-1)
            sums.append(float(sum(logp_TV[t - 1, ids_T[t]] for t in range(len(prompt), len(ids_T)))))
        assert record["kl"] == pytest.approx(sums[0] - sums[1], abs=1e-4)
    found = metrics(run)
    assert found["kl"] == pytest.approx(mean_over_prompts(records, "kl"))
    assert found["kl_low"] > 0


def test_the_win_rate_compares_samples_of_the_same_prompt_and_number(
    init_folder: Path, other: Path, prompts: Path, chain_rows: Rows, tmp_path: Path
) -> None:
    chosen = CONFIG | {"judge": {"name": "size"}}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts, opponent=other))
    ours, theirs = (
        sample_rows(load_policy(folder), chain_rows[:12], Sampling(max_new_tokens=6), seed=0, samples=4)[0]
        for folder in (init_folder, other)
    )
    expected = [
        1.0 if len(a.text) > len(b.text) else 0.0 if len(a.text) < len(b.text) else 0.5
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert [record["win_rate"] for record in generations(run)] == expected
    assert set(expected) == {0.0, 0.5, 1.0}
    # As many samples a prompt: the mean over prompts is that over samples.
    assert metrics(run)["win_rate"] == pytest.approx(np.mean(expected))


def test_a_judge_without_an_opponent_is_not_asked(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = CONFIG | {"judge": {"name": "size"}}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts))
    assert "win_rate" not in metrics(run)
    assert "win_rate" not in generations(run)[0]


def test_missing_scores_are_left_out_and_counted(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    reward = {"name": "size", "args": {"least": 14}}
    chosen = CONFIG | {"rewards": [reward], "verifier": None}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts))
    records, found = generations(run), metrics(run)
    short = [r for r in records if len(r["completion"]) < 14]
    assert 5 < len(short) < 43
    assert found["rewards.size_missing"] == len(short)
    assert [r["rewards.size"] for r in short] == [None] * len(short)
    assert found["rewards.size"] == pytest.approx(mean_over_prompts(records, "rewards.size"))
    assert found["rewards.size_low"] >= 14
    assert "accuracy" not in found


def test_scores_that_are_all_missing_give_no_mean(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    verifier = {"name": "size", "args": {"least": 10_000}}
    chosen = CONFIG | {"verifier": verifier}
    run = run_stage(request_for("evaluate", tmp_path / "run", chosen, policy=init_folder, prompts=prompts))
    found = metrics(run)
    assert found["accuracy_missing"] == 48
    assert not {"accuracy", "accuracy_low", "pass_at_4"} & set(found)


@pytest.mark.parametrize("role", ["verifier", "rewards", "judge"])
def test_a_missing_column_is_refused_before_anything_is_loaded(
    chain_rows: Rows, dataset: Make, tmp_path: Path, role: str
) -> None:
    (tmp_path / "no model").mkdir()
    rows = dataset([{n: row[n] for n in ("id", "prompt", "answer")} for row in chain_rows])
    reward: Any = {"name": "chain_sum"}
    chosen = CONFIG | {role: [reward] if role == "rewards" else reward}
    models = {"policy": tmp_path / "no model", "opponent": tmp_path / "no model"}
    with pytest.raises(InputError, match=r"'chain_sum' needs the column 'problem', which the prompts"):
        run_stage(request_for("evaluate", tmp_path / "run", chosen, prompts=rows, **models))


def test_prompts_that_fill_the_context_are_dropped_and_counted(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    long = {"id": "long", "prompt": [{"role": "user", "content": "1" + "+1" * 130}], "problem": "1", "answer": "1"}
    short = {name: chain_rows[0][name] for name in ("id", "prompt", "problem", "answer")}
    both, alone = dataset([long, short], "both"), dataset([long], "alone")
    run = run_stage(request_for("evaluate", tmp_path / "run", CONFIG, policy=init_folder, prompts=both))
    assert metrics(run)["prompts_dropped"] == 1
    assert [record["id"] for record in generations(run)] == [short["id"]] * 4
    with pytest.raises(InputError, match="every prompt fills the model's context"):
        run_stage(request_for("evaluate", tmp_path / "none", CONFIG, policy=init_folder, prompts=alone))


def test_batch_sizes_and_repetition_change_nothing(init_folder: Path, other: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = CONFIG | {"judge": {"name": "size"}}
    models = {"policy": init_folder, "reference": other, "opponent": other}
    runs = [
        run_stage(request_for("evaluate", tmp_path / f"run {i}", chosen | {"runtime": runtime}, prompts=prompts, **models))
        for i, runtime in enumerate(
            [CONFIG["runtime"], CONFIG["runtime"], CONFIG["runtime"] | {"generation_batch": 256, "micro_batch_tokens": 50}]
        )
    ]
    files = [sha256_file(run.folder / "outputs" / "generations" / "data.parquet") for run in runs]
    assert files[0] == files[1]
    assert metrics(runs[0]) == metrics(runs[1])
    assert metrics(runs[2]) == pytest.approx(metrics(runs[0]), abs=1e-4)
    texts = [[record["completion"] for record in generations(run)] for run in runs]
    assert texts[2] == texts[0]


def test_log_probs_of_bfloat16_weights_differ_but_little(init_folder: Path, other: Path, prompts: Path, tmp_path: Path) -> None:
    exact, rough = (
        metrics(
            run_stage(
                request_for(
                    "evaluate",
                    tmp_path / dtype,
                    CONFIG | {"dtype": dtype},
                    policy=init_folder,
                    prompts=prompts,
                    reference=other,
                )
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    assert rough["kl"] == pytest.approx(exact["kl"], rel=0.2)
    assert rough["kl"] != exact["kl"]


# A learned reward.

UNVERIFIED = CONFIG | {"verifier": None}


@pytest.fixture
def reward_model(init_folder: Path, tmp_path: Path) -> Path:
    """Random weights, 3 added to the raw scores, which are halved and turned: what it likes best, its raw scores like least."""
    learned = new_reward_model(init_folder, seed=1)
    learned.calibrate(3.0, -0.5)
    save_reward_model(learned, tmp_path / "reward model")
    return tmp_path / "reward model"


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
