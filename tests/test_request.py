"""A stage's request: its expected key, its name, and the exit codes of `python -m stages`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, request_for
from pydantic import ValidationError

from stages.__main__ import main
from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.request import Request, run_stage
from stages.run import Event

Source = Callable[[str], Path]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A procedural source's folder."""

    def make(name: str = "chain-sum/prompts") -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "procedural.json").write_text(json.dumps({"name": name}))
        return folder

    return make


@pytest.fixture
def request_(source: Source, tmp_path: Path) -> Request:
    return request_for("prepare", tmp_path / "run", {"rows": 20, "seed": 3}, source=source("chain-sum/prompts"))


def write(request: Request) -> str:
    request.folder.mkdir(exist_ok=True)
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json())
    return str(file)


def test_a_request_runs_its_stage_and_ends_with_what_was_made(request_: Request) -> None:
    heard: list[Event] = []
    run = run_stage(request_, heard.append)
    assert len(list(read_rows(run.folder / "outputs" / "train"))) == 20
    assert json.loads((run.folder / "outputs.json").read_text()) == {"key": request_.key, "outputs": {"train": "dataset"}}
    assert [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()] == heard
    assert heard[-1] == {"event": "done"}


def test_a_request_survives_its_file(request_: Request) -> None:
    assert Request.model_validate_json(request_.model_dump_json()) == request_


@pytest.mark.parametrize("change", ["key", "config", "digest"])
def test_another_key_than_the_expected_one_is_refused(request_: Request, change: str) -> None:
    changes: dict[str, Any] = {
        "key": {"key": "0" * 64},
        "config": {"config": request_.config | {"seed": 4}},
        "digest": {"inputs": {"source": request_.inputs["source"].model_copy(update={"digest": "other"})}},
    }
    with pytest.raises(InputError, match=r"prepare: this machine's code computes the key [0-9a-f]{12}, the request expects"):
        run_stage(request_.model_copy(update=changes[change]))
    assert not request_.folder.exists()


def test_operational_settings_are_not_part_of_the_key(tmp_path: Path) -> None:
    def key(**config: Any) -> str:
        return request_for("sft", tmp_path, config, model=tmp_path, train=tmp_path).key

    assert key(runtime={"device": "cuda:1", "micro_batch_tokens": 5}) == key()
    assert key(seed=1) != key()


def test_an_unknown_stage_is_refused(request_: Request) -> None:
    with pytest.raises(InputError, match=r"no stage is named 'bake'; there are prepare, sft"):
        run_stage(request_.model_copy(update={"stage": "bake"}))


def test_unknown_fields_of_a_request_are_refused(request_: Request) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Request.model_validate(request_.model_dump() | {"colour": "red"})


def test_python_m_stages_runs_a_request(request_: Request) -> None:
    command = [sys.executable, "-m", "stages", write(request_)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (request_.folder / "outputs.json").is_file()


def test_python_m_stages_says_in_one_line_what_a_person_can_mend(source: Source, tmp_path: Path) -> None:
    request = request_for("prepare", tmp_path / "run", {}, source=source("chain-sum/prompts"))
    command = [sys.executable, "-m", "stages", write(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: procedural:chain-sum/prompts")
    assert done.stderr.count("\n") == 1
    assert not (request.folder / "outputs.json").exists()


def test_a_wrong_key_gives_exit_code_2_and_one_line(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(request_.model_copy(update={"key": "0" * 64}))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: prepare: this machine's code computes the key")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["one", "two"]])
def test_another_number_of_arguments_gives_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == "usage: python -m stages request.json\n"


@pytest.mark.parametrize("text", [None, "{", '{"stage": "sft"}'])
def test_what_is_no_request_gets_one_line(tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "request.json"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
