"""Evaluation: means and intervals over prompts, win rates with ties, KL, pass@k, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluating
import numpy as np
import pytest
import torch
from conftest import request_for
from evaluating import CONFIG, Make, Rows, generations, mean_over_prompts, metrics

from stages.artifacts import sha256_file
from stages.data.chat import encode_prompt
from stages.errors import InputError
from stages.evaluate import by_prompt, wins
from stages.models.load import load_policy
from stages.request import run_stage
from stages.rollouts.engine import Completion
from stages.rollouts.sample import Sample, sample_rows
from stages.specs.common import Sampling

registered = evaluating.registered
prompts = evaluating.prompts
other = evaluating.other


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
    with pytest.raises(InputError, match=r"'chain_sum' needs the column 'problem', which is not in the prompts"):
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
