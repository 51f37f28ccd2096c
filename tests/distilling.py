"""What the tests of `distill` share: a student and a teacher, the stage on a few rows, the loss written out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import request_for
from test_divergence import plain_kl
from test_sft import config

import stages.distill
from stages.data.parquet import write_rows
from stages.models.load import load_policy, save_policy
from stages.request import run_stage
from stages.run import Listener, Run

Rows = list[dict[str, Any]]
Inputs = dict[str, Path]
DRAWN: dict[str, Any] = {"source": "student", "student_sampling": {"max_new_tokens": 8}}
# Every objective and source that a config allows.
CASES: dict[str, dict[str, Any]] = {
    "likelihood": {"objective": "likelihood"},
    **{objective: {"objective": objective} for objective in ("forward_kl", "reverse_kl")},
    **{f"{objective} drawn": {"objective": objective, **DRAWN} for objective in ("forward_kl", "reverse_kl")},
}


def same_family(init_folder: Path, folder: Path, seed: int) -> Path:
    """A model of other weights, which ends about half of its completions of 8 tokens."""
    policy: Any = load_policy(init_folder, seed=seed)
    policy.model.get_input_embeddings().weight.data[policy.stops[0]] *= 12
    save_policy(policy, folder)
    return folder


@pytest.fixture(scope="session")
def inputs(init_folder: Path, chain_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A student with dropout, a teacher, and rows for both sides."""
    root = tmp_path_factory.mktemp("distill")
    found = {"model": same_family(init_folder, root / "student", 0), "teacher": same_family(init_folder, root / "teacher", 7)}
    for name, rows in (("train", chain_rows[:20]), ("heldout", chain_rows[32:])):
        (root / name).mkdir()
        write_rows(root / name, rows)
        found[name] = root / name
    return found


def with_dropout(model: Path, folder: Path) -> Path:
    """The same model, whose attention forgets a third of what it sees in training."""
    shutil.copytree(model, folder)
    text = (folder / "config.json").read_text()
    assert '"attention_dropout": 0.0' in text
    (folder / "config.json").write_text(text.replace('"attention_dropout": 0.0', '"attention_dropout": 0.33'))
    return folder


def distill(inputs: Inputs, folder: Path, listener: Listener | None = None, **changes: Any) -> Run:
    """Run the stage; a likelihood is given no teacher."""
    chosen, given = config(**changes), dict(inputs)
    if chosen.get("objective", "likelihood") == "likelihood":
        given.pop("teacher", None)
    return run_stage(request_for("distill", folder, chosen, **given), listener)


def spied_collect(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The list that fills with every draw from now on: the step, the student as it was then, the rows and the rollouts."""
    seen: list[Any] = []
    original: Callable[..., Any] = stages.distill.collect

    def spied(accelerator: Any, student: Any, rows: Any, sampling: Any, seed: int, step: int, runtime: Any) -> Any:
        then = deepcopy(student.model)
        found = original(accelerator, student, rows, sampling, seed, step, runtime)
        seen.append(SimpleNamespace(step=step, model=then, rows=rows, rollouts=found, training=student.model.training))
        return found

    monkeypatch.setattr(stages.distill, "collect", spied)
    return seen


def written_out(objective: str, student: Any, teacher: Any, sequences: list[tuple[list[int], int]]) -> torch.Tensor:
    """The mean over the tokens from each sequence's first target on, in float64, with plain transformers."""
    parts = []
    for ids, first in sequences:
        if objective == "likelihood":
            ids_T = torch.tensor(ids)
            logp_TV = student(ids_T[None]).logits[0, :-1].double().log_softmax(-1)
            parts.append(-logp_TV.gather(-1, ids_T[1:, None])[first - 1 :, 0])
        else:
            parts.append(plain_kl(student, teacher, np.array(ids), objective)[first - 1 :])  # pyright: ignore[reportArgumentType]
    return torch.cat(parts).mean()
