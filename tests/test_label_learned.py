"""Labels by a learned reward model, against transformers' own classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import labelling
import pytest
import torch
from labelling import (
    CONFIG,
    Label,
    Rows,
    chain_group,
    counts,
    preferences,
)
from transformers import AutoModelForSequenceClassification

import stages.label
from stages.data.chat import encode
from stages.models.reward import load_reward_model, score_rows

registered = labelling.registered
label = labelling.label
LEARNED: dict[str, Any] = CONFIG | {"reward": None}


@torch.no_grad()
def plain_rewards(folder: Path, rows: Rows) -> dict[tuple[str, str], float]:
    """The oracle: transformers' own classifier on each sequence alone, (raw + 3) * -0.5."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = load_reward_model(folder)
    found = {}
    for row in rows:
        encoded = encode(loaded.tokenizer, row["prompt"], row["completion"], loaded.stops)
        ids = [*encoded.prompt_ids, *encoded.completion_ids]
        assert ids[-1] == loaded.stops[0]
        ids = ids[:-1] if row["finish"] == "length" else ids
        raw = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        found[row["completion"], row["finish"]] = (raw + 3) * -0.5
    return found


def test_a_reward_model_s_rewards_order_the_pairs(label: Label, reward_model: Path) -> None:
    texts = ["<answer>5</answer>", "", "1+2=3;3+2=5", "<think>1+2=3</think>", "7"]
    rows = [*chain_group("1+2+2", *texts), *chain_group("3+4", "8", "7", "9")]
    run = label(rows, LEARNED | {"runtime": CONFIG["runtime"] | {"micro_batch_tokens": 20}}, reward_model=reward_model)
    found = preferences(run)
    assert len(found) == 10 + 3
    expected = plain_rewards(reward_model, rows[:5]), plain_rewards(reward_model, rows[5:])
    for place, row in enumerate(found):
        rewards = expected[place >= 10]
        assert row["chosen_score"] > row["rejected_score"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == pytest.approx(rewards[row[side], "stop"], abs=1e-5)
        assert row["margin"] == row["chosen_score"] - row["rejected_score"]
    assert len({round(row["chosen_score"], 4) for row in found}) == 6
    ranked = preferences(label(rows, LEARNED | {"form": "rankings"}, reward_model=reward_model))
    for row, rewards in zip(ranked, expected, strict=True):
        assert row["completions"] == [text for text, _ in sorted(rewards, key=lambda key: -rewards[key])]


def test_truncated_samples_are_scored_without_an_end(label: Label, reward_model: Path) -> None:
    rows = chain_group("1+2", "1+2=3", "3", "1+2=", "<answer>")
    for row, finish in zip(rows, ("length", "stop", "length", "stop"), strict=True):
        row["finish"] = finish
    expected = plain_rewards(reward_model, rows)
    finishes = dict(expected.keys())
    ended = plain_rewards(reward_model, [row | {"finish": "stop"} for row in rows])
    assert abs(expected["1+2=3", "length"] - ended["1+2=3", "stop"]) > 1e-3
    found = preferences(label(rows, LEARNED, reward_model=reward_model))
    assert len(found) == 6
    for row in found:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_finish"] == finishes[row[side]]
            assert row[f"{side}_score"] == pytest.approx(expected[row[side], finishes[row[side]]], abs=1e-5)
    [ranking] = preferences(label(rows, LEARNED | {"form": "rankings"}, reward_model=reward_model))
    assert ranking["finishes"] == [finishes[text] for text in ranking["completions"]]
    assert ranking["scores"] == pytest.approx([expected[text, finishes[text]] for text in ranking["completions"]], abs=1e-5)


def test_what_does_not_fit_into_the_reward_model_has_no_score(label: Label, reward_model: Path) -> None:
    """The context is 128: prompt, completion and EOS. Without its EOS a truncated one has a token more."""
    rows = chain_group("1", *("1" + "+1" * (length - 1) for length in (124, 123, 125, 124)))
    rows[3]["finish"] = "length"
    rows[3]["completion"] = "2" + "+1" * 123
    run = label(rows, LEARNED, reward_model=reward_model)
    [row] = preferences(run)
    assert {row["chosen"], row["rejected"]} == {rows[1]["completion"], rows[3]["completion"]}
    assert counts(run)["samples without a score"] == 2


def test_a_reward_model_in_another_type(label: Label, reward_model: Path) -> None:
    rows = chain_group("1+2", "3", "1+2=3")
    exact, rough = (
        preferences(label(rows, LEARNED | {"dtype": dtype}, reward_model=reward_model))[0]["chosen_score"]
        for dtype in ("float32", "bfloat16")
    )
    assert rough == pytest.approx(exact, abs=0.05)
    assert rough != exact


def test_the_runtime_is_that_of_the_config(label: Label, reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def record(*arguments: Any) -> Any:
        limits.append(arguments[-1])
        return score_rows(*arguments)

    monkeypatch.setattr(stages.label, "score_rows", record)
    before = torch.get_num_threads()
    for threads in (2, 1):
        runtime = {"device": "cpu", "threads": threads, "micro_batch_tokens": 10 + threads}
        label(chain_group("1+2", "3", "4"), LEARNED | {"runtime": runtime}, reward_model=reward_model)
        assert torch.get_num_threads() == threads
    assert limits == [12, 11]
    torch.set_num_threads(before)
