"""Two processes under torchrun on the CPU write the samples of one process, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import endpoint_server  # pyright: ignore[reportMissingImports]
import pytest
from conftest import ROOT, request_for  # pyright: ignore[reportMissingImports]

from stages.artifacts import sha256_file
from stages.data.parquet import read_rows
from stages.request import Request, run_stage
from stages.run import Event

pytestmark = pytest.mark.slow
server = endpoint_server.server
home = endpoint_server.home
CONFIG: dict[str, Any] = {
    "samples": 3,
    "sampling": {"max_new_tokens": 8},
    # Two prompts a batch and process: 23 prompts are five batches of four on two processes, and one that leaves them unequal.
    "runtime": {"device": "cpu", "threads": 1, "generation_batch": 6, "save_every": 2},
}


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def launch(request: Request, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a request on two processes."""
    request.folder.mkdir(exist_ok=True)
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "stages",
        str(file),
    ]
    return subprocess.run(command, cwd=ROOT, check=check, timeout=300, capture_output=True, text=True)


# Prompts that fill the context: none; some, among them all those of one process's share, and of a whole batch; the last.
@pytest.mark.parametrize(("count", "long"), [(23, []), (21, [1, 3, 8, 9, 10, 11])], ids=["23 prompts", "long ones among 21"])
def test_two_processes_write_the_bytes_of_one(
    init_folder: Path,
    chain_rows: list[dict[str, Any]],
    dataset: Callable[..., Path],
    tmp_path: Path,
    count: int,
    long: list[int],
) -> None:
    rows = [{name: row[name] for name in ("id", "prompt", "problem", "answer")} for row in chain_rows[:count]]
    for place in long:
        rows[place]["prompt"] = [{"role": "user", "content": "1" + "+1" * 130}]
    inputs = {"policy": init_folder, "prompts": dataset(rows, "prompts")}
    one, two = tmp_path / "one process", tmp_path / "two processes"
    run_stage(request_for("sample", one, CONFIG, **inputs))
    launch(request_for("sample", two, CONFIG, **inputs))
    records = list(read_rows(two / "outputs" / "samples"))
    kept = [row["id"] for place, row in enumerate(rows) if place not in long]
    assert [record["id"] for record in records] == [place for place in kept for _ in range(3)]
    files = [sha256_file(folder / "outputs" / "samples" / "data.parquet") for folder in (one, two)]
    assert files[0] == files[1]
    [first], [second] = logged(one, "metrics"), logged(two, "metrics")
    assert first == second
    assert second["metrics"]["prompts_dropped"] == len(long)
    # Twice as many prompts a batch, and so half as many states.
    assert [event["step"] for event in logged(one, "state")] == list(range(4, count, 4))
    assert [event["step"] for event in logged(two, "state")] == list(range(8, count, 8))


class CrashError(Exception):
    """What a listener raises in the place of a crash."""


def test_a_run_goes_on_with_another_number_of_processes(
    init_folder: Path, chain_rows: list[dict[str, Any]], dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """What two processes left when they failed, one ends, and the other way round."""
    rows = [{name: row[name] for name in ("id", "prompt", "problem", "answer")} for row in chain_rows[:17]]
    # The last prompt lacks the role that the template asks for: two processes fail on it, after the states of those before.
    prompts = dataset(rows, "prompts")
    broken = dataset([*rows[:-1], rows[-1] | {"prompt": [{"content": "1+1"}]}], "broken")
    expected = run_stage(request_for("sample", tmp_path / "whole", CONFIG, policy=init_folder, prompts=prompts))

    failed = launch(request_for("sample", tmp_path / "two, one", CONFIG, policy=init_folder, prompts=broken), check=False)
    assert failed.returncode != 0
    assert [event["step"] for event in logged(tmp_path / "two, one", "state")] == [8, 16]
    run_stage(request_for("sample", tmp_path / "two, one", CONFIG, policy=init_folder, prompts=prompts))

    def crash(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    request = request_for("sample", tmp_path / "one, two", CONFIG, policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash)
    launch(request)
    assert [event["step"] for event in logged(tmp_path / "one, two", "state")] == [4, 12]

    for folder in (tmp_path / "two, one", tmp_path / "one, two"):
        found, whole = (one / "outputs" / "samples" / "data.parquet" for one in (folder, expected.folder))
        assert sha256_file(found) == sha256_file(whole)


def test_two_processes_ask_a_teacher_each_for_its_share(
    server: Any, chain_rows: list[dict[str, Any]], dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep the best of it; some prompts are refused."""
    rows = [{name: row[name] for name in ("id", "prompt", "problem", "answer")} for row in chain_rows[:11]]
    refused = {rows[place]["prompt"][-1]["content"] for place in (1, 2, 9)}

    def script(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["content"] in refused:
            return endpoint_server.failing(400, "too long")
        return endpoint_server.chat("x" * (body["seed"] % 97))

    server.script = script
    best = {"keep": 2, "rewards": [{"name": "length", "args": {"weight": 1}}]}
    config = CONFIG | {"endpoint": server.endpoint().model_dump(), "best_of": best}
    prompts = dataset(rows, "prompts")
    run_stage(request_for("sample", tmp_path / "one", config, prompts=prompts))
    first = len(server.asked)
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "another home"))
    launch(request_for("sample", tmp_path / "two", config, prompts=prompts))
    assert len(server.asked) == 2 * first == 66
    files = [sha256_file(tmp_path / name / "outputs" / "samples" / "data.parquet") for name in ("one", "two")]
    assert files[0] == files[1]
    [one], [two] = logged(tmp_path / "one", "metrics"), logged(tmp_path / "two", "metrics")
    assert one == two
    assert (two["metrics"]["prompts_dropped"], two["metrics"]["samples"]) == (3, 16)
