"""What the tests of `label` share: rewards that a table's own text decides, the stage on rows, what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import request_for

from stages.artifacts import sha256_file
from stages.data.parquet import read_rows
from stages.request import run_stage
from stages.rewards import REWARDS, RewardEntry, Score
from stages.run import Run

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
Scores = list[Score | None]
SCORED: list[str] = []


def worth(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], factor: float = 1.0) -> Scores:
    """The number that a completion starts with; none for a question mark, a failure for "broken"."""
    SCORED.extend(completions)
    if "broken" in completions:
        raise KeyError("no such thing")
    return [None if text.startswith("?") else Score(factor * float(text.split()[0])) for text in completions]


def bonus(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    """What the row's column says, whatever the text; none where it is null."""
    return [None if row["bonus"] is None else Score(row["bonus"]) for row in rows]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    SCORED.clear()
    for name, columns in (("worth", ("answer",)), ("bonus", ("bonus",))):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"labelling:{name}", version=1, columns=columns))


def group(prompt: str, *completions: str, **columns: Any) -> Rows:
    """Samples of one prompt, as `sample` writes them."""
    return [
        {"id": f"id of {prompt}", "prompt": prompt, "answer": f"answer to {prompt}"}
        | columns
        | {"step": 0, "sample": number, "completion": text, "length": len(text), "finish": "stop", "policy": "policy"}
        for number, text in enumerate(completions)
    ]


def chain_group(content: str, *completions: str) -> Rows:
    """Samples in the words of the tiny model."""
    return [row | {"prompt": [{"role": "user", "content": content}]} for row in group(content, *completions)]


CONFIG: dict[str, Any] = {"reward": {"name": "worth"}, "heldout": 0, "runtime": {"device": "cpu", "threads": 1}}
RANKINGS: dict[str, Any] = CONFIG | {"form": "rankings"}


@pytest.fixture
def label(dataset: Make, tmp_path: Path) -> Callable[..., Run]:
    """Run the stage on rows, in a folder of its own each time."""
    names = map("run {}".format, count())

    def run(rows: Rows, config: dict[str, Any] = CONFIG, **inputs: Path) -> Run:
        name = next(names)
        return run_stage(request_for("label", tmp_path / name, config, samples=dataset(rows, f"samples of {name}"), **inputs))

    return run


Label = Callable[..., Run]


def preferences(run: Run, name: str = "train") -> Rows:
    return list(read_rows(run.folder / "outputs" / name))


def digest(run: Run, name: str = "train") -> str:
    return sha256_file(run.folder / "outputs" / name / "data.parquet")


def outputs(run: Run) -> set[str]:
    return set(json.loads((run.folder / "outputs.json").read_text())["outputs"])


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def metrics(run: Run) -> dict[str, float]:
    [event] = events(run, "metrics")
    assert event["step"] == 0
    return event["metrics"]


def counts(run: Run) -> dict[str, int]:
    [table] = events(run, "table")
    assert table["name"] == "preferences"
    return {row["what"]: row["number"] for row in table["rows"]}


def pairs(rows: Rows) -> list[tuple[str, str, float]]:
    return [(row["chosen"], row["rejected"], row["margin"]) for row in rows]


def rankings(rows: Rows) -> list[tuple[list[str], list[int]]]:
    return [(row["completions"], row["ranks"]) for row in rows]


PROMPTS = 3000


def many(*completions: str, prompts: int = PROMPTS) -> Rows:
    return [row for number in range(prompts) for row in group(f"{number}", *completions)]


def within(frequency: float, probability: float, number: int) -> bool:
    """Whether a frequency is within 4 standard errors of what is expected."""
    return abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / number)
