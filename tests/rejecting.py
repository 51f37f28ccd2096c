"""What the tests of `rejection` share: the stage on rows whose text or columns decide their scores, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import request_for

from stages.artifacts import sha256_file
from stages.data.parquet import read_rows
from stages.request import run_stage
from stages.run import Run

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
Reject = Callable[..., Run]
# Both rewards are those of tests/labelling.py: `worth` is the number that a text starts with, `bonus` a column.
RIGHT: dict[str, Any] = {"name": "worth", "minimum": 1.0}
CONFIG: dict[str, Any] = {"criteria": [RIGHT], "runtime": {"device": "cpu", "threads": 1}}


@pytest.fixture
def reject(dataset: Make, tmp_path: Path) -> Reject:
    """Run the stage on rows with some values of the config changed, in a folder of its own each time."""
    names = map("run {}".format, count())

    def run(rows: Rows, inputs: dict[str, Path] | None = None, **changes: Any) -> Run:
        name = next(names)
        given = {"samples": dataset(rows, f"samples of {name}")} | (inputs or {})
        return run_stage(request_for("rejection", tmp_path / name, CONFIG | changes, **given))

    return run


def made(run: Run, name: str = "train") -> Rows:
    folder = run.folder / "outputs" / name
    return list(read_rows(folder)) if any(folder.glob("*")) else []


def texts(run: Run, name: str = "train") -> list[str]:
    return [row["completion"] for row in made(run, name)]


def pass_rates(run: Run) -> dict[str, float]:
    return {row["prompt"]: row["pass_rate"] for row in made(run, "prompts")}


def digests(run: Run) -> dict[str, str]:
    return {path.parent.name: sha256_file(path) for path in (run.folder / "outputs").glob("*/data.parquet")}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def counts(folder: Path) -> dict[str, int]:
    [table] = events(folder, "table")
    assert table["name"] == "samples"
    return {row["what"]: row["number"] for row in table["rows"]}


def metrics(run: Run) -> dict[str, float]:
    [event] = events(run.folder, "metrics")
    assert event["step"] == 0
    return event["metrics"]
