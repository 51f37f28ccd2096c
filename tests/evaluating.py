"""What the tests of `evaluate` share: rewards that a random model does not fail altogether, data, what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.data.parquet import read_rows
from stages.models.load import load_policy, save_policy
from stages.rewards import REWARDS, RewardEntry, Score
from stages.run import Run

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
Scores = list[Score | None]


def even(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    """1 for a completion of an even number of characters."""
    return [Score(1.0 - len(text) % 2) for text in completions]


def size(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], least: int = 0) -> Scores:
    """The number of characters; none below `least`."""
    return [Score(float(len(text))) if len(text) >= least else None for text in completions]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("even", "size"):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"evaluating:{name}", version=1))


CONFIG: dict[str, Any] = {
    "prompts": 12,
    "samples": 4,
    "sampling": {"max_new_tokens": 6},
    "verifier": {"name": "even"},
    "bootstrap": 200,
    "runtime": {"device": "cpu", "threads": 1, "generation_batch": 7},
}


@pytest.fixture
def prompts(chain_rows: Rows, dataset: Make) -> Path:
    return dataset([{n: row[n] for n in ("id", "prompt", "problem", "answer")} for row in chain_rows], "prompts")


@pytest.fixture
def other(init_folder: Path, tmp_path: Path) -> Path:
    """Another model than the init folder's: its weights come from another seed."""
    save_policy(load_policy(init_folder, seed=5), tmp_path / "other")
    return tmp_path / "other"


def metrics(run: Run) -> dict[str, float]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    [found] = [event["metrics"] for event in lines if event["event"] == "metrics"]
    return found


def generations(run: Run) -> Rows:
    return list(read_rows(run.folder / "outputs" / "generations"))


def mean_over_prompts(records: Rows, column: str, reduce: Callable[[list[float]], float] = np.mean) -> float:  # pyright: ignore[reportArgumentType]
    groups = [[r[column] for r in group if r[column] is not None] for _, group in groupby(records, lambda r: r["id"])]
    return float(np.mean([reduce(group) for group in groups if group]))
