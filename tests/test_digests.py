"""What a tiny run of every stage makes, pinned: code that changes it must raise the stage's VERSION (DESIGN 3).

Text is pinned by digest. Weights are pinned by numbers with few digits, since their last bits differ between processors.
When this test fails and the change is meant, raise `version` in the stage's spec and put what the test prints into
`tests/data/pinned.json`.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, request_for

from stages.artifacts import read_manifest, sha256_file
from stages.data.parquet import read_rows
from stages.request import run_stage
from stages.specs import STAGES

PINNED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "pinned.json").read_text())
RUNTIME = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, init_folder: Path) -> dict[str, Any]:
    return tiny_runs(tmp_path_factory.mktemp("digests"), init_folder)


def tiny_runs(root: Path, init_folder: Path) -> dict[str, Any]:
    """Each stage's version and what it made."""
    source = root / "source"
    source.mkdir()
    (source / "procedural.json").write_text(json.dumps({"name": "chain-sum/demonstrations"}))

    def run(stage: str, config: dict[str, Any], **inputs: Path) -> Path:
        events: list[dict[str, Any]] = []
        run_stage(request_for(stage, root / stage, config, **inputs), events.append)
        numbers = {k: v for e in events if e["event"] == "metrics" for k, v in e["metrics"].items() if "second" not in k}
        found[stage] = {"version": STAGES[stage].version, "metrics": {k: float(f"{v:.4g}") for k, v in numbers.items()}}
        return root / stage / "outputs"

    found: dict[str, Any] = {}
    data = run("prepare", {"rows": 40, "heldout": 0.25, "split_by": "problem"}, source=source)
    found["prepare"]["digests"] = {n: read_manifest(data / n, "dataset").digest[:16] for n in ("train", "heldout")}
    sampling, adamw = {"max_new_tokens": 6}, {"lr": 1e-2}
    config = {
        "steps": 5,
        "batch_size": 4,
        "optimizer": adamw,
        "generations": 3,
        "sampling": sampling,
        "runtime": RUNTIME,
    }
    sft = run("sft", config, model=init_folder, train=data / "train", heldout=data / "heldout")
    found["sft"]["columns"] = pq.read_schema(sft / "generations" / "data.parquet").names
    found["sft"]["files"] = sorted(path.name for path in (sft / "checkpoint").iterdir())
    drawn = run(
        "sample", {"samples": 2, "sampling": sampling, "runtime": RUNTIME}, policy=sft / "checkpoint", prompts=data / "train"
    )
    found["sample"]["columns"] = pq.read_schema(drawn / "samples" / "data.parquet").names
    # Lengths are the negative thousandth of the characters.
    criteria = [{"name": "length", "weight": 2.0, "maximum": -0.012}, {"name": "format", "where": {"finish": "length"}}]
    config = {"criteria": criteria, "complete": False, "per_prompt": 1, "choose": "random", "heldout": 0.3}
    chosen = run("rejection", config, samples=drawn / "samples")
    found["rejection"]["digests"] = {path.name: read_manifest(path, "dataset").digest[:16] for path in sorted(chosen.iterdir())}
    config = {"reward": {"name": "length"}, "noise": 0.01, "heldout": 0.3}
    labels = run("label", config, samples=drawn / "samples")
    found["label"]["digests"] = {n: read_manifest(labels / n, "dataset").digest[:16] for n in ("train", "heldout")}
    asked = run("questions", {"limit": 12}, samples=drawn / "samples") / "questions"
    found["questions"]["digests"] = {path.name: sha256_file(path)[:16] for path in sorted(asked.iterdir())}
    given = root / "given"
    given.mkdir()
    for name, choices in (("A", "left right tie"), ("B", "left left right right")):
        chosen = zip(read_rows(asked), cycle(choices.split()))
        rows = [{"question": row["id"], "annotator": name, "choice": choice} for row, choice in chosen]
        (given / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    people = run("answers", {"heldout": 0.3}, questions=asked, answers=given)
    found["answers"]["digests"] = {path.name: read_manifest(path, "dataset").digest[:16] for path in sorted(people.iterdir())}
    config = {"steps": 5, "batch_size": 4, "optimizer": adamw, "bootstrap": 100, "runtime": RUNTIME}
    paths = {"model": sft / "checkpoint", "train": labels / "train", "heldout": labels / "heldout"}
    paths |= {"demonstrations": data / "train", "samples": drawn / "samples"}
    reward = run("reward_model", config, **paths)
    found["reward_model"]["columns"] = pq.read_schema(reward / "scores" / "data.parquet").names
    found["reward_model"]["files"] = sorted(path.name for path in (reward / "checkpoint").iterdir())
    config = {"steps": 2, "batch_size": 4, "epochs": 2, "minibatches": 2, "optimizer": adamw, "critic": {"optimizer": adamw}}
    config |= {"sampling": sampling, "runtime": RUNTIME}
    ppo = run("ppo", config, policy=sft / "checkpoint", reward=reward / "checkpoint", prompts=data / "train")
    found["ppo"]["columns"] = pq.read_schema(ppo / "rollouts" / "data.parquet").names
    config = {"steps": 2, "prompts": 3, "group": 3, "epochs": 2, "minibatches": 2, "optimizer": adamw, "sampling": sampling}
    config |= {"rewards": [{"name": "length", "weight": 50.0}, {"name": "reward_model"}], "reference_kl": {"coefficient": 0.1}}
    paths = {"policy": sft / "checkpoint", "reward_model": reward / "checkpoint", "prompts": data / "train"}
    grpo = run("grpo", config | {"refill": {"rounds": 1}, "runtime": RUNTIME}, **paths)
    found["grpo"]["columns"] = pq.read_schema(grpo / "rollouts" / "data.parquet").names
    config = {"steps": 3, "batch_size": 4, "optimizer": adamw, "generations": 3, "sampling": sampling, "runtime": RUNTIME}
    config |= {"objective": "forward_kl", "source": "student", "student_sampling": sampling}
    paths = {"model": init_folder, "teacher": sft / "checkpoint", "train": data / "train", "heldout": data / "heldout"}
    student = run("distill", config, **paths)
    found["distill"]["columns"] = pq.read_schema(student / "generations" / "data.parquet").names
    found["distill"]["files"] = sorted(path.name for path in (student / "checkpoint").iterdir())
    config = {"max_length": 96, "runtime": RUNTIME}
    paths = {"train": labels / "train", "heldout": labels / "heldout"}
    logps = run("log_probs", config, model=sft / "checkpoint", **paths)
    found["log_probs"]["columns"] = pq.read_schema(logps / "train" / "data.parquet").names
    config |= {"steps": 5, "batch_size": 4, "objective": {"beta": 0.5}, "optimizer": adamw, "bootstrap": 100}
    config |= {"monitor": {"every": 2, "prompts": 4, "sampling": sampling, "judge": {"name": "length"}}}
    paths |= {"policy": sft / "checkpoint", "train_log_probs": logps / "train"}
    preferred = run("preference", config, **paths)
    found["preference"]["columns"] = pq.read_schema(preferred / "rewards" / "data.parquet").names
    found["preference"]["files"] = sorted(path.name for path in (preferred / "checkpoint").iterdir())
    config = {"verifier": {"name": "answer"}, "rewards": [{"name": "chain_sum"}], "sampling": sampling, "runtime": RUNTIME}
    paths = {"policy": sft / "checkpoint", "reference": init_folder, "prompts": data / "heldout"}
    evaluated = run("evaluate", config, **paths)
    found["evaluate"]["columns"] = pq.read_schema(evaluated / "generations" / "data.parquet").names
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_tiny_run_makes_what_is_pinned(made: dict[str, Any], stage: str) -> None:
    assert made[stage] == PINNED.get(stage), f"raise the version of {stage}, then pin: {json.dumps(made[stage], indent=4)}"
