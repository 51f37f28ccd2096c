"""DPO by the stage `preference` beside TRL's DPOTrainer: the same model, pairs and batches, on this machine's processor.

    uv run python tests/benchmarks/dpo_trl.py MODEL [--pairs tests/data/hh-rlhf.jsonl] [--rows 8] [--batch 8] [--rounds 3]

MODEL is a checkpoint's folder or a GGUF file. Both read the reference's log-probs from before training, in batches of all of a
step's pairs. Processor seconds of a process each, taking turns; those of two lengths of training are subtracted: loading the
models, tokenising and the reference do not count. With as many rows as a batch has pairs, both take the same in every step;
threads that wait for each other burn processor seconds, so one is enough on a busy machine (`--threads 1`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stages.artifacts import digest_of
from stages.data.parquet import write_rows
from stages.data.schemas import canonical, row_id
from stages.models.load import load_policy, save_policy
from stages.run import Run
from stages.specs.preference import PreferenceConfig

Row = dict[str, Any]
LENGTH = 512


def pairs(path: Path, count: int) -> list[Row]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [canonical(row, f"row {number}") for number, row in enumerate(lines[:count], start=1)]
    return [row | {"id": row_id(row)} for row in rows]


def ours(model: Path, rows: list[Row], steps: int, batch: int, folder: Path, shared: bool) -> None:
    from stages.preference import preference

    for name in ("train", "heldout"):
        (folder / name).mkdir()
        write_rows(folder / name, rows if name == "train" else rows[:1])
    runtime = {"device": "cpu", "micro_batch_tokens": 10**6, "share_prompts": shared, "save_every": 10**6, "log_every": 10**6}
    runtime["threads"] = torch.get_num_threads()
    config = PreferenceConfig.model_validate(
        {"steps": steps, "batch_size": batch, "max_length": LENGTH, "monitor": {"every": 0, "prompts": 0}, "runtime": runtime}
    )
    run = Run(folder / "run", {"checkpoint": "model", "rewards": "dataset"}, key=digest_of(steps))
    preference(config, run, policy=model, train=folder / "train", heldout=folder / "heldout")


def theirs(model: Path, rows: list[Row], steps: int, batch: int, folder: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    def turn(text: str) -> list[Row]:
        return [{"role": "assistant", "content": text}]

    given = [{"prompt": row["prompt"], "chosen": turn(row["chosen"]), "rejected": turn(row["rejected"])} for row in rows]
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"}
    arguments = DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_length=LENGTH,
        precompute_ref_log_probs=True,
        **settings,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    DPOTrainer(loaded, args=arguments, train_dataset=Dataset.from_list(given), processing_class=tokenizer).train()


def seconds(who: str, steps: int, asked: argparse.Namespace) -> float:
    """Processor seconds of a process that trains for so many steps."""
    command = [sys.executable, __file__, str(asked.model), "--who", who, "--steps", f"{steps}", "--pairs", str(asked.pairs)]
    command += ["--rows", f"{asked.rows}", "--batch", f"{asked.batch}", "--threads", f"{asked.threads}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=Path, default=Path("tests/data/hh-rlhf.jsonl"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--who", choices=("ours", "shared", "trl"), help="only train, and print the processor seconds")
    asked = parser.parse_args()
    with TemporaryDirectory() as scratch:
        if asked.who:
            torch.set_num_threads(asked.threads)
            rows = pairs(asked.pairs, asked.rows)
            start = time.process_time()
            if asked.who == "trl":
                theirs(asked.model, rows, asked.steps, asked.batch, Path(scratch))
            else:
                ours(asked.model, rows, asked.steps, asked.batch, Path(scratch), asked.who == "shared")
            print(time.process_time() - start)
            return
        if asked.model.suffix == ".gguf":
            folder = Path(scratch) / "gguf"
            folder.mkdir()
            (folder / asked.model.name).symlink_to(asked.model.resolve())
            asked.model = Path(scratch) / "model"
            save_policy(load_policy(folder), asked.model)
        found: dict[str, list[float]] = {"trl": [], "ours": [], "shared": []}
        for number in range(asked.rounds):
            for who in [*found][:: 1 if number % 2 else -1]:
                one, more = (seconds(who, steps, asked) for steps in (1, 1 + asked.steps))
                found[who].append((more - one) / asked.steps)
        for who, taken in found.items():
            ratio = statistics.median(other / one for one, other in zip(taken, found["trl"], strict=True))
            print(f"{who:8}{statistics.median(taken):9.3f} processor seconds a step, TRL / this {ratio:6.2f}")


if __name__ == "__main__":
    main()
