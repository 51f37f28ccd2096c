"""How many tokens a policy thinks, by its own tokenizer, between the tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluating
import numpy as np
import pytest
from conftest import request_for
from evaluating import CONFIG, Make, Rows, generations, metrics

import stages.evaluate
from stages.request import run_stage
from stages.rollouts.sample import Sample
from stages.specs import STAGES

registered = evaluating.registered
prompts = evaluating.prompts
# The words of the tiny model are numbers, signed digits, "=", ";" and the tags: each is a token.
THOUGHT = {
    "<think>1+2=3</think><answer>3</answer>": 4,
    "<think>12+3=15;15-9=6</think><answer>6</answer>": 9,
    "<answer>3</answer>": 0,
    "<think></think><answer>3</answer>": 0,
    "<think>1+2=3;3": 6,
    "<think>1</think>5<think>2;2</think>": 7,
    "": 0,
}


def says(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """Let the policy say these texts in turn."""
    original: Any = stages.evaluate.sample_rows

    def said(*given: Any, **named: Any) -> Any:
        samples, dropped = original(*given, **named)
        turned = [
            Sample(one.row, one.sample, one.prompt_ids, one.completion, texts[place % len(texts)])
            for place, one in enumerate(samples)
        ]
        return turned, dropped

    monkeypatch.setattr(stages.evaluate, "sample_rows", said)


def test_thinking_is_the_mean_over_prompts(
    init_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(THOUGHT)
    says(monkeypatch, texts)
    run = run_stage(request_for("evaluate", tmp_path / "run", CONFIG, policy=init_folder, prompts=prompts))
    found = metrics(run)
    means = [np.mean([THOUGHT[texts[(4 * prompt + k) % len(texts)]] for k in range(4)]) for prompt in range(12)]
    assert found["thinking"] == pytest.approx(np.mean(means))
    assert found["thinking_low"] < found["thinking"] < found["thinking_high"]
    assert "thinking_missing" not in found
    assert "thinking" not in generations(run)[0], "like the length, it can be told from the text"
    assert type(generations(run)[0]["length"]) is int


@pytest.mark.parametrize(("texts", "there"), [(["<answer>3</answer>", "1</think>"], False), (["", "<think>"], True)])
def test_without_a_tag_there_is_no_thinking(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    texts: list[str], there: bool,
) -> None:  # fmt: skip
    says(monkeypatch, texts)
    rows = dataset([{"id": row["id"], "prompt": row["prompt"]} for row in chain_rows[:2]])
    run = run_stage(request_for("evaluate", tmp_path / "run", CONFIG, policy=init_folder, prompts=rows))
    assert ("thinking" in metrics(run)) is there
    assert metrics(run).get("thinking", 0) == 0


def test_what_is_measured_made_another_version() -> None:
    assert STAGES["evaluate"].version == 2
    assert STAGES["evaluate"].headline == ("accuracy", "win_rate", "reward", "rewards.*", "thinking", "kl")
