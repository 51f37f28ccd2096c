"""A real server with a real model, `transformers serve` on SmolLM2-135M: as a teacher, as a judge, and as both at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import request_for  # pyright: ignore[reportMissingImports]

from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.models.endpoint import answers_file
from stages.models.load import load_policy, save_policy
from stages.request import run_stage
from stages.rewards.judge import JudgeArgs, verdicts
from stages.run import Event

pytestmark = pytest.mark.slow
QUESTIONS = [
    "What is the capital of France?",
    "Name a primary colour.",
    "What is 2+2?",
    "Write one sentence about the sea.",
    "What is 1+1?",
    "How many legs has a dog?",
    "Why is the sky blue?",
    "How many days has a week?",
]
ANSWERS = ["Paris.", "Blue.", "4", "The sea is deep.", "2", "It has 4 legs.", "Ask me later.", "A week has 7 days."]
# A model of this size cannot judge: mostly it repeats the answer. What is tested is the way there and back, so any single digit
# that it says is taken for its rating.
RUBRIC = "Reply with one number from {lowest} to {highest}: how good is the answer?"
JUDGE = {"rubric": RUBRIC, "pattern": r"\b(\d)\b", "lowest": 0, "highest": 9, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address. It serves the folder `smollm2`, whose name is the model's."""
    root = tmp_path_factory.mktemp("served")
    save_policy(load_policy(smollm2), root / "smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    options = ["serve", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (root / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *options], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 300
            while not healthy(port):
                assert child.poll() is None, (root / "log").read_text()
                assert time.monotonic() < deadline, (root / "log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            child.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def endpoint(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return {"model": "smollm2", "url": url, "timeout": 200, "concurrency": 2}


@pytest.fixture
def prompts(dataset: Callable[..., Path]) -> Path:
    rows = [{"id": str(n), "prompt": [{"role": "user", "content": text}]} for n, text in enumerate(QUESTIONS)]
    return dataset(rows, "prompts")


def test_a_teacher_says_what_the_model_says_here(
    endpoint: dict[str, Any], smollm2: Path, prompts: Path, tmp_path: Path
) -> None:
    """Greedily, the server's completions are those of our own engine."""
    common = {"samples": 1, "sampling": {"temperature": 0, "max_new_tokens": 16}, "runtime": {"device": "cpu", "threads": 1}}
    taught = run_stage(request_for("sample", tmp_path / "taught", common | {"endpoint": endpoint}, prompts=prompts))
    ours = run_stage(request_for("sample", tmp_path / "ours", common, policy=smollm2, prompts=prompts))
    one, other = (list(read_rows(run.folder / "outputs" / "samples")) for run in (taught, ours))
    for row in one:
        print(row)
    assert [row["id"] for row in one] == [str(n) for n in range(8)]
    assert {row["policy"] for row in one} == {"smollm2"}
    same = [(a, b) for a, b in zip(one, other, strict=True) if a["completion"] == b["completion"]]
    assert len(same) >= 7, "another order of sums may turn one of two near words"
    assert all(a["finish"] == b["finish"] and abs(a["length"] - b["length"]) <= 1 for a, b in same)
    assert any("Paris" in row["completion"] for row in one)
    assert {row["finish"] for row in one} == {"stop", "length"}


def test_the_best_of_a_teacher_s_samples_by_a_judge(endpoint: dict[str, Any], prompts: Path, tmp_path: Path) -> None:
    args: dict[str, Any] = JUDGE | {"endpoint": endpoint}
    config = {
        "samples": 2,
        "sampling": {"max_new_tokens": 8},
        "endpoint": endpoint,
        "best_of": {"rewards": [{"name": "judge", "args": args}]},
        "runtime": {"device": "cpu", "generation_batch": 4},
    }
    seen: list[Event] = []
    run = run_stage(request_for("sample", tmp_path / "one", config, prompts=prompts), seen.append)
    rows = list(read_rows(run.folder / "outputs" / "samples"))
    [metrics] = [event["metrics"] for event in seen if event["event"] == "metrics"]
    print(metrics, rows)
    assert 1 <= len(rows) <= 8, "a prompt is left out when the judge rated none of its samples"
    assert all(0 <= row["reward"] <= 1 for row in rows)
    assert metrics["unrated"] < 16
    # Once more with the server out of reach: all of it is there already.
    away = endpoint | {"url": "http://127.0.0.1:9/v1", "retries": 0}
    config |= {"endpoint": away, "best_of": {"rewards": [{"name": "judge", "args": args | {"endpoint": away}}]}}
    again = run_stage(request_for("sample", tmp_path / "two", config, prompts=prompts))
    assert list(read_rows(again.folder / "outputs" / "samples")) == rows
    assert answers_file().is_file()


def test_a_judge_rates_or_says_why_not(endpoint: dict[str, Any]) -> None:
    args = JudgeArgs.model_validate(JUDGE | {"endpoint": endpoint})
    found = verdicts(ANSWERS, [{"prompt": question} for question in QUESTIONS], args)
    print(found)
    assert len(found) == 8
    for score, why in found:
        assert (score is None) == bool(why)
        assert score is None or score.total in [n / 9 for n in range(10)]
    assert any(score is not None for score, _ in found)
    assert any("no rating" in why for _, why in found)


def test_a_model_that_the_server_does_not_have(endpoint: dict[str, Any], prompts: Path, tmp_path: Path) -> None:
    config = {"samples": 1, "endpoint": endpoint | {"model": "no-such-model", "retries": 0}, "sampling": {"max_new_tokens": 4}}
    with pytest.raises(InputError, match="no-such-model"):
        run_stage(request_for("sample", tmp_path / "run", config, prompts=prompts))
