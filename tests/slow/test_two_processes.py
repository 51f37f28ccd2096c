"""Two processes under torchrun on the CPU train as one process does (contract 8)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, request_for  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow


def losses(folder: Path) -> dict[str, list[float]]:
    """Each metric of interest in the order in which it was logged."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    logged = [event["metrics"] for event in lines if event["event"] == "metrics"]
    names = ("loss", "grad_norm", "heldout_loss_before", "heldout_loss")
    return {name: [values[name] for values in logged if name in values] for name in names}


# The second case: one rank has no row of a step's batch, nor of the held-out rows, and the head has weights of its own.
@pytest.mark.parametrize(("batch_size", "heldout_rows"), [(10, 11), (1, 1)])
def test_two_processes_give_the_losses_of_one(
    init_folder: Path,
    chain_rows: list[dict[str, Any]],
    dataset: Callable[..., Path],
    tmp_path: Path,
    batch_size: int,
    heldout_rows: int,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    spec = (init_folder / "init.yaml").read_text()
    assert "tie_word_embeddings: true" in spec
    (model / "init.yaml").write_text(spec.replace("tie_word_embeddings: true", "tie_word_embeddings: false"))
    inputs = {"model": model, "train": dataset(chain_rows[:32], "train"), "heldout": dataset(chain_rows[32:], "heldout")}
    config: dict[str, Any] = {
        "steps": 6,
        "batch_size": batch_size,
        "max_length": 96,
        "heldout_rows": heldout_rows,
        "generations": 4,
        "optimizer": {"lr": 1e-2},
        "sampling": {"max_new_tokens": 4},
        # So few tokens that the ranks have several micro-batches each, and not equally many.
        "runtime": {"device": "cpu", "threads": 1, "micro_batch_tokens": 70, "save_every": 3, "log_every": 1},
    }
    found = {}
    for processes in (1, 2):
        request = request_for("sft", tmp_path / f"{processes} processes", config, **inputs)
        request.folder.mkdir()
        file = request.folder / "request.json"
        file.write_text(request.model_dump_json())
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "stages"]
        subprocess.run([sys.executable, *launcher, str(file)], cwd=ROOT, check=True, timeout=300)
        found[processes] = losses(request.folder)
        assert (request.folder / "outputs.json").is_file()
        assert len(found[processes]["loss"]) == 6
        assert len(found[processes]["heldout_loss_before"]) == 1
    for name, values in found[1].items():
        assert found[2][name] == pytest.approx(values, abs=1e-5), name
