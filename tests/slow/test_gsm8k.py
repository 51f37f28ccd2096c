"""The small recipe for GSM8K through the command line, cut down to a few steps on the few rows in `tests/data/`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from recipes import run_recipe, settings

from stages.artifacts import handle
from stages.data.parquet import read_rows
from tasks.home import configure_environment
from tasks.store import Store

pytestmark = pytest.mark.slow
STEPS = ["prompts", "evaluate-base", "zero", "evaluate-zero", "samples", "accepted", "sft", "evaluate-sft"]
SETTINGS = ["prompts.heldout=0.3", "prompts.max_heldout=3", "prompts.filters.max_prompt_chars=1000"]
SETTINGS += ["zero.steps=2", "zero.prompts=2", "zero.group=2", "samples.prompts=4", "sft.steps=1", "sft.generations=2"]
SETTINGS += [f"{step}.sampling.max_new_tokens=24" for step in ("zero", "samples", "sft", "evaluate")]


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The state folder, and the steps that the command reports."""
    state = tmp_path_factory.mktemp("state")
    references = [f"inputs.model={next(smollm2.glob('*.gguf'))}", "inputs.prompts=tests/data/gsm8k.jsonl"]
    return state, run_recipe(state, "gsm8k-smollm2-small", *settings(*references, *SETTINGS))


def test_it_runs_to_the_end_and_reports_what_it_measured(run: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    state, steps = run
    print({name: step["seconds"] for name, step in steps.items()})
    assert list(steps) == STEPS
    assert {step["status"] for step in steps.values()} == {"ran"}
    for name in ("base", "zero", "sft"):
        found = steps[f"evaluate-{name}"]["metrics"]
        assert 0 <= found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] <= 1
        assert 0 <= found["rewards.format"] <= 1
    assert all(math.isfinite(steps["zero"]["metrics"][name]) for name in ("reward", "grad_norm", "length"))
    assert list((state / "plots").glob("gsm8k-smollm2-small-zero-*.png"))


def test_its_rollouts_tell_what_every_reward_gave(
    run: tuple[Path, dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, steps = run
    monkeypatch.setenv("POSTTRAIN_HOME", str(state))
    rows = list(read_rows(Store(configure_environment()).locate(handle(**steps["zero"]["artifacts"]["rollouts"]))))
    assert [(row["step"], row["sample"]) for row in rows] == [
        (step, sample) for step in (0, 1) for _ in "ab" for sample in (0, 1)
    ]
    for row in rows:
        assert float(row["answer"]) >= 0
        assert row["prompt"][0]["role"] == "system"
        parts = {name: row[f"rewards.{name}"] for name in ("math", "format", "language")}
        if None not in parts.values():
            rules = parts["math"] + 0.2 * parts["format"] + 0.2 * parts["language"]
            assert row["reward"] == pytest.approx(rules + row["rewards.overlong"])
