"""The two steps of people's labels through the real store: a person is told where the page is, and their files are found."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from asking import given
from labelling import many
from rich.console import Console

from stages.artifacts import Dataset
from stages.data.parquet import read_rows, write_rows
from stages.errors import InputError
from tasks.execute import StepResult, execute
from tasks.home import configure_environment
from tasks.plan import StepCall
from tasks.references import resolve
from tasks.report import print_results
from tasks.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return Store(configure_environment())


def step(stage: str, config: dict[str, Any], **inputs: Any) -> StepResult:
    return execute.fn(StepCall(recipe="people", name=stage, stage=stage, config=config, inputs=inputs, pipeline=""))


def printed(*results: StepResult) -> str:
    text = StringIO()
    print_results(Console(file=text, width=60), "people", results)
    return text.getvalue()


def test_from_samples_to_pairs(store: Store, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    write_rows(tmp_path / "samples", many("1", "2", prompts=8))
    samples = resolve(store, str(tmp_path / "samples"), "dataset")
    asked = step("questions", {}, samples=samples)
    page = Path(str(asked.page))
    assert page.name == "page.html"
    assert f"questions: label them in {page}" in printed(asked).splitlines()
    made = asked.artifacts["questions"]
    assert isinstance(made, Dataset)
    manifest = store.manifest(store.client.get_run(asked.run_id), "questions")
    assert (manifest.rows, [file.path for file in manifest.files]) == (8, ["data.parquet", "page.html"])

    # What is found by its key is the same page; a page that was changed since is made again.
    again = step("questions", {}, samples=samples)
    assert (again.status, again.page) == ("skipped", asked.page)
    page.write_text("another page")
    again = step("questions", {}, samples=samples)
    assert (again.status, again.artifacts["questions"].digest) == ("ran", made.digest)

    (tmp_path / "answers").mkdir()
    questions = list(read_rows(page.parent))
    for name, choices in (("A", "llll"), ("B", "lrlt")):
        text = "".join(json.dumps(row) + "\n" for row in given(name, questions, choices))
        (tmp_path / "answers" / f"answers-{name}.jsonl").write_text(text)
    answers = resolve(store, f"{tmp_path}/answers/*.jsonl", "dataset")
    pairs = step("answers", {"heldout": 0}, questions=made, answers=answers)
    assert pairs.page is None
    assert "label them" not in printed(pairs)
    assert (pairs.metrics["rows_train"], pairs.metrics["agreement"]) == (2, 0.5)
    with pytest.raises(
        InputError, match=r"answers: answers-A\.jsonl row \d: none of the 8 questions has the id .* another page"
    ):
        step(
            "answers",
            {"heldout": 0},
            questions=step("questions", {"seed": 12}, samples=samples).artifacts["questions"],
            answers=answers,
        )
