"""The recipe for HH-RLHF through the command line, cut down to a few steps on the few rows in `tests/data/`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import run_recipe, settings

from stages.artifacts import handle
from stages.data.parquet import read_rows
from tasks.home import configure_environment
from tasks.store import Store

pytestmark = pytest.mark.slow
STEPS = ["prompts", "demonstrations", "preferences", "sft", "reward_model"]
STEPS += ["evaluate-base", "evaluate-sft", "ppo", "evaluate-ppo"]
SETTINGS = ["sft.steps=2", "sft.batch_size=4", "sft.generations=2", "reward_model.steps=2", "reward_model.batch_size=2"]
SETTINGS += ["ppo.steps=2", "ppo.batch_size=4", "evaluate.prompts=2", "evaluate.bootstrap=100"]
SETTINGS += [f"{step}.sampling.max_new_tokens=8" for step in ("sft", "ppo", "evaluate")]


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The state folder, and the steps that the command reports."""
    state = tmp_path_factory.mktemp("state")
    references = [f"inputs.model={next(smollm2.glob('*.gguf'))}", "inputs.preferences=tests/data/hh-rlhf.jsonl"]
    return state, run_recipe(state, "hh-smollm2-small", *settings(*references, *SETTINGS))


@pytest.fixture
def folders(run: tuple[Path, dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Path]:
    """Where the outputs of the steps are."""
    state, steps = run
    monkeypatch.setenv("POSTTRAIN_HOME", str(state))
    store = Store(configure_environment())
    made = [(name, output, given) for name, step in steps.items() for output, given in step["artifacts"].items()]
    return {(name, output): store.locate(handle(**given)) for name, output, given in made}


def test_it_runs_to_the_end_and_reports_what_it_measured(run: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    state, steps = run
    print({name: step["seconds"] for name, step in steps.items()})
    assert list(steps) == STEPS
    assert {step["status"] for step in steps.values()} == {"ran"}
    pairs = steps["reward_model"]["metrics"]
    assert 0 <= pairs["pair_accuracy_low"] <= pairs["pair_accuracy"] <= pairs["pair_accuracy_high"] <= 1
    for name in ("base", "sft", "ppo"):
        found = steps[f"evaluate-{name}"]["metrics"]
        assert found["reward_low"] <= found["reward"] <= found["reward_high"]
        assert "accuracy" not in found
        if name != "base":
            assert 0 <= found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"] <= 1
            assert math.isfinite(found["kl"])
    assert {"reward", "kl", "length"} <= set(steps["ppo"]["metrics"])
    assert list((state / "plots").glob("hh-smollm2-small-ppo-*.png"))


def test_what_is_held_out_was_trained_on_nowhere(folders: dict[tuple[str, str], Path]) -> None:
    prompts = {
        (step, side): {json.dumps(row["prompt"]) for row in read_rows(folders[step, side])}
        for step in ("prompts", "demonstrations", "preferences")
        for side in ("train", "heldout")
    }
    for (step, side), found in prompts.items():
        assert found, (step, side)
    train, heldout = (set().union(*(found for (_, s), found in prompts.items() if s == side)) for side in ("train", "heldout"))
    assert not train & heldout
    measured = {json.dumps(row["prompt"]) for row in read_rows(folders["evaluate-ppo", "generations"])}
    assert measured <= prompts["prompts", "heldout"]


def test_its_checkpoints_are_plain_transformers_ones(folders: dict[tuple[str, str], Path]) -> None:
    code = (
        "import sys, torch, transformers as t\n"
        "for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    model, tokenizer = getattr(t, kind).from_pretrained(folder), t.AutoTokenizer.from_pretrained(folder)\n"
        "    ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], return_tensors='pt', return_dict=True)\n"
        "    print(bool(torch.isfinite(model(**ids).logits).all()), tokenizer.pad_token_id != tokenizer.eos_token_id)\n"
    )
    policies = [folders["sft", "checkpoint"], folders["ppo", "checkpoint"]]
    scorers = [folders["reward_model", "checkpoint"], folders["ppo", "critic"]]
    words = [word for folder in policies for word in ("AutoModelForCausalLM", str(folder))]
    words += [word for folder in scorers for word in ("AutoModelForSequenceClassification", str(folder))]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 8
