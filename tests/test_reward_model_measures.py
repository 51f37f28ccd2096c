"""What the reward model measures of held-out preferences, and how its rewards are shifted and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import reward_bench
import torch
from reward_bench import Fit, checkpoint, long_text, plain, series, tables, tokens
from test_sft import Rows, events

import stages.models.reward
import stages.reward_model
from stages.models.reward import RewardModel
from stages.statistics import summary

request_of = reward_bench.request_of
fit = reward_bench.fit
pairs = reward_bench.pairs
rankings = reward_bench.rankings
reward = reward_bench.reward


def by_length(*arguments: Any) -> list[np.ndarray]:
    """In the place of `raw_step_scores`: a completion's score is its number of tokens over four."""
    return [np.array([len(ids) / 4]) for ids in arguments[2]]


def nll(differences: Sequence[float]) -> float:
    return float(np.mean([math.log(1 + math.exp(-one)) for one in differences]))


def test_pairs_are_measured(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.reward_model, "raw_step_scores", by_length)
    more = [2, 1, 0, -1, 3, 0, 8, -2]  # tokens that the chosen has more than the rejected
    texts = [{"chosen": "1" + "+1" * (4 + n), "rejected": "2" + "+1" * 4} for n in more]
    margins = [0.4, 0.3, 9.0, 0.1, 0.7, 0.5, 0.8, 0.2]
    rows = [pairs[0] | two | {"margin": margin} for two, margin in zip(texts, margins, strict=True)]
    run = fit({"steps": 1, "seed": 5}, rows)
    # By confidence in bins of 0.1: 1 and -1; 2, 3 and -2; 8.
    bins = [[1, -1], [2, 3, -2], [8]]
    sure = [[1 / (1 + math.exp(-abs(n) / 4)) for n in one] for one in bins]
    right = [[n > 0 for n in one] for one in bins]
    error = sum(abs(sum(a) - sum(b)) for a, b in zip(sure, right, strict=True)) / 6
    expected = [4 / 6, 2 / 8, nll([n / 4 for n in more]), error]
    assert series(run, "pair_accuracy", "pair_ties", "heldout_loss", "calibration_error") == pytest.approx(expected)
    # This seed's 200 resamples give another interval than 100 of them, or than another seed's.
    interval = summary("of", [[1], [1], [0], [1], [1], [0]], 200, 5)
    assert series(run, "pair_accuracy_low", "pair_accuracy_high") == [interval["of_low"], interval["of_high"]]
    found = {name: [list(row.values()) for row in rows] for name, rows in tables(run).items()}
    wanted = [[0.5 + 0.1 * k, len(a), np.mean(a), np.mean(b)] for k, a, b in zip((0, 1, 3), sure, right, strict=True)]
    assert np.array(found["calibration"]) == pytest.approx(np.array(wanted))
    # From, to, pairs and accuracy; without the tied ones, of margins 9 and 0.5.
    assert found["accuracy by margin"] == [[0.1, 0.2, 2, 0], [0.3, 0.3, 1, 1], [0.4, 0.4, 1, 1], [0.7, 0.8, 2, 1]]


def test_rankings_are_measured_by_row(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.reward_model, "raw_step_scores", by_length)
    rows = [
        {"completions": ["1+1+1", "1", "2"], "ranks": [1, 2, 2]},  # two right; the tied ones are no pair
        {"completions": ["1", "1+1", "1+1+1"], "ranks": [1, 2, 3]},  # three wrong
        {"completions": ["1", "2", "1+1"], "ranks": [3, 2, 1]},  # equal scores, and two right
        {"completions": ["3", "4"], "ranks": [1, 2]},  # nothing decided
    ]
    run = fit({"steps": 1}, [row | {"prompt": pairs[0]["prompt"], "margin": 1.0} for row in rows])
    loss = np.mean([nll([0.5, 0.5]), nll([-0.25, -0.25, -0.5]), nll([0, 0.25, 0.25]), nll([0])])
    assert series(run, "pair_accuracy", "pair_ties", "heldout_loss") == pytest.approx([2 / 3, 2 / 9, loss])
    assert "accuracy by margin" not in tables(run)


def test_rewards_are_shifted_and_scaled(fit: Fit, pairs: Rows, rankings: Rows, reward: RewardModel) -> None:
    # Of what is too long for 60 tokens, one row loses a completion, and one row, a demonstration and a sample are left out.
    held = [dict(row) for row in rankings]
    held[3] |= {"completions": [long_text(reward, held[3], 61), *held[3]["completions"][1:]]}
    held[5] |= {"completions": [long_text(reward, held[5], 61)] * len(held[5]["completions"])}
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    demonstrations[2] |= {"completion": long_text(reward, demonstrations[2], 61)}
    samples = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs]
    samples = [row | {"finish": "length" if k % 3 else "stop"} for k, row in enumerate(samples)]
    samples[5] |= {"completion": long_text(reward, samples[5], 62), "finish": "length"}
    changes = {"max_length": 60, "shift_rows": 20, "scale_rows": 30, "runtime": {"micro_batch_tokens": 300}}
    run = fit(changes, rankings, held, demonstrations=demonstrations, samples=samples)

    model = checkpoint(run)
    bias, scale = model.config.reward_bias, model.config.reward_scale
    assert series(run, "reward_bias", "reward_scale") == [bias, scale]

    def rewards(sequences: list[list[int]]) -> torch.Tensor:
        return (plain(model, [ids for ids in sequences if len(ids) <= 60]) + bias) * scale

    given = rewards([tokens(reward, row, row["completion"]) for row in demonstrations[:20]])
    drawn = rewards([tokens(reward, row, row["completion"], row["finish"]) for row in samples[:30]])
    assert (len(given), len(drawn)) == (19, 29)
    assert given.mean().item() == pytest.approx(0, abs=1e-4)
    assert drawn.std(correction=0).item() == pytest.approx(1, abs=1e-4)

    records = tables(run)["scores"]
    assert [{name: value for name, value in row.items() if name != "rewards"} for row in records] == [*held[:5], *held[6:]]
    for row in records:
        sequences = [tokens(reward, row, text) for text in row["completions"]]
        expected = iter(rewards(sequences).tolist())
        assert row["rewards"] == [pytest.approx(next(expected), abs=1e-4) if len(ids) <= 60 else None for ids in sequences]
    assert records[3]["rewards"][0] is None


@pytest.mark.parametrize("bits", [0, 1])
def test_equal_scores_decide_and_scale_nothing(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    # In batches of unequal sizes the last bits of one sample's scores may differ.
    alike = np.array([0.25, 0.25 + bits * np.spacing(np.float32(0.25))] * 4)
    monkeypatch.setattr(stages.reward_model, "score_rows", lambda *_: alike)
    monkeypatch.setattr(stages.reward_model, "raw_step_scores", lambda *arguments: [np.zeros(1)] * len(arguments[2]))
    # One margin is missing: then there is no table by margin.
    held = [*pairs[:7], pairs[7] | {"margin": None}]
    run = fit({"steps": 1}, pairs, held, samples=[{"prompt": pairs[0]["prompt"], "completion": "1"}] * 8)
    assert series(run, "pair_ties", "heldout_loss", "reward_scale") == pytest.approx([1, math.log(2), 1])
    assert series(run, "pair_accuracy", "pair_accuracy_before") == []
    assert "accuracy by margin" not in tables(run)
    [message] = events(run.folder, "message")
    assert "all have one score" in message["text"]
