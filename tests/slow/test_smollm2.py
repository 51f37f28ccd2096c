"""A real pre-trained chat model, from the GGUF file inside a PyPI wheel: loading, SFT, evaluation, plain transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, request_for

from stages.models.load import load_policy
from stages.request import run_stage
from stages.rollouts.sample import sample_rows
from stages.specs.common import Sampling

pytestmark = pytest.mark.slow


def test_it_answers(smollm2: Path) -> None:
    policy = load_policy(smollm2)
    row = {"id": "a", "prompt": [{"role": "user", "content": "What is the capital of France? Answer in one word."}]}
    samples, dropped = sample_rows(policy, [row], Sampling(temperature=0, max_new_tokens=24), seed=0)
    assert dropped == 0
    assert "Paris" in samples[0].text
    assert samples[0].completion.finish == "stop"
    assert policy.pad_id not in policy.stops


def prepared(tmp_path: Path, file: str, config: dict[str, Any]) -> Path:
    """The outputs of `prepare` on a file of real rows."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(ROOT / "tests" / "data" / file, source / file)
    run_stage(request_for("prepare", tmp_path / "prepare", config, source=source))
    return tmp_path / "prepare" / "outputs"


def measured(stage: str, folder: Path, config: dict[str, Any], **inputs: Path) -> dict[str, float]:
    """Run a stage; the last value of each of its metrics."""
    events: list[dict[str, Any]] = []
    run_stage(request_for(stage, folder, config, **inputs), events.append)
    return {name: value for event in events if event["event"] == "metrics" for name, value in event["metrics"].items()}


def test_a_reward_model_learns_hh_rlhf(smollm2: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    config = {"heldout": 0.2, "unusable": "drop", "filters": {"max_prompt_chars": 400, "max_completion_chars": 400}}
    data = prepared(tmp_path, "hh-rlhf.jsonl", config)
    config = {"steps": 6, "batch_size": 4, "max_length": 256, "optimizer": {"lr": 5e-5, "warmup": 0.0, "schedule": "constant"}}
    config |= {"bootstrap": 200, "runtime": {"device": "cpu", "micro_batch_tokens": 1024}}
    inputs = {"model": smollm2, "train": data / "train", "heldout": data / "heldout"}
    metrics = measured("reward_model", tmp_path / "reward", config, **inputs)
    print(metrics)
    assert 0 <= metrics["pair_accuracy_low"] <= metrics["pair_accuracy"] <= metrics["pair_accuracy_high"] <= 1
    assert metrics["loss"] < 0.6931

    code = (
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side='right')\n"
        "batch = tokenizer(['one', 'one and two more'], return_tensors='pt', padding=True)\n"
        "alone = tokenizer(['one'], return_tensors='pt')\n"
        "assert torch.allclose(model(**batch).logits[:1], model(**alone).logits, atol=1e-3)\n"
    )
    checkpoint = str(tmp_path / "reward" / "outputs" / "checkpoint")
    subprocess.run([sys.executable, "-c", code, checkpoint], check=True)


def test_sft_on_gsm8k_lowers_the_heldout_loss(smollm2: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    config: dict[str, Any] = {"columns": {"prompt": "question", "completion": "answer"}, "chat": True, "heldout": 0.3}
    data = prepared(tmp_path, "gsm8k.jsonl", config)
    config = {"steps": 4, "batch_size": 4, "max_length": 512, "optimizer": {"lr": 5e-5, "warmup": 0.0}, "generations": 2}
    config |= {"sampling": {"max_new_tokens": 16}, "runtime": {"device": "cpu", "micro_batch_tokens": 1024}}
    metrics = measured("sft", tmp_path / "sft", config, model=smollm2, train=data / "train", heldout=data / "heldout")
    assert metrics["heldout_loss"] < metrics["heldout_loss_before"]

    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\ntokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert tokenizer.pad_token_id != tokenizer.eos_token_id\nprint(sum(p.numel() for p in model.parameters()))\n"
    )
    checkpoint = str(tmp_path / "sft" / "outputs" / "checkpoint")
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000
