"""What the tests of `sample` share: a small config, rows, what was drawn and what was written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for

import stages.sample
from stages.artifacts import sha256_file
from stages.data.parquet import read_rows
from stages.request import run_stage
from stages.rollouts.sample import sample_rows
from stages.run import Event, Run

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
# Two prompts a batch, a state after each batch.
CONFIG: dict[str, Any] = {
    "samples": 3,
    "sampling": {"max_new_tokens": 6},
    "runtime": {"device": "cpu", "threads": 1, "generation_batch": 6, "save_every": 1},
}
COLUMNS = ("id", "prompt", "problem", "answer")
RECORDED = ("step", "sample", "completion", "length", "finish", "policy")


def config(**changes: Any) -> dict[str, Any]:
    """The small config with some values changed; mappings are merged."""
    merged = {name: CONFIG[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
    return CONFIG | merged


def only(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def samples(run: Run) -> Rows:
    return list(read_rows(run.folder / "outputs" / "samples"))


def digest(run: Run) -> str:
    [path] = (run.folder / "outputs").rglob("*.*")
    assert path == run.folder / "outputs" / "samples" / "data.parquet"
    return sha256_file(path)


def events(folder: Path, kind: str) -> list[Event]:
    lines = (folder / "events.jsonl").read_text().splitlines() if (folder / "events.jsonl").is_file() else []
    # A child that is killed, or still writes, may leave the last line unfinished.
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["event"] == kind]


def metrics(run: Run) -> dict[str, float]:
    [found] = events(run.folder, "metrics")
    assert found["step"] == 0
    return found["metrics"]


def long_row(tokens: int) -> dict[str, Any]:
    """A row whose prompt has so many tokens: BOS, two roles, the first number, and one for each summand."""
    row = {"id": f"long {tokens}", "prompt": [{"role": "user", "content": "1" + "+1" * (tokens - 4)}]}
    return row | {"problem": "1", "answer": "1"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Some of these runs set the threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(chain_rows: Rows) -> Rows:
    return [only(row, *COLUMNS) for row in chain_rows[:11]]


@pytest.fixture
def prompts(rows: Rows, dataset: Make) -> Path:
    return dataset(rows, "prompts")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that the stage samples, in its order."""
    seen: list[str] = []

    def record(policy: Any, batch: Rows, *arguments: Any, **named: Any) -> Any:
        seen.extend(row["id"] for row in batch)
        return sample_rows(policy, batch, *arguments, **named)

    monkeypatch.setattr(stages.sample, "sample_rows", record)
    return seen


class CrashError(Exception):
    """What a listener raises in the place of a crash."""


def crash_at(kind: str, number: int) -> Callable[[Event], None]:
    """A listener that fails at the so manyth event of a kind."""
    left = Counter({kind: number})

    def listen(event: Event) -> None:
        left[event["event"]] -= 1
        if event["event"] == kind and left[kind] == 0:
            raise CrashError

    return listen


@pytest.fixture
def whole(init_folder: Path, prompts: Path, tmp_path: Path) -> Run:
    """A run that nothing interrupted."""
    return run_stage(request_for("sample", tmp_path / "whole", config(), policy=init_folder, prompts=prompts))
