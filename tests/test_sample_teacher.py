"""Sampling from a teacher behind an endpoint: what it is asked, what is written, and what happens when it fails."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import endpoint_server
import pytest
import sampling
from conftest import request_for
from endpoint_server import Answer, Body, Server, chat, failing, last_message
from sampling import COLUMNS, RECORDED, CrashError, Make, Rows, config, crash_at, digest, events, metrics, only, samples

from stages.data.parquet import read_schema
from stages.errors import InputError
from stages.request import run_stage
from stages.rollouts.seeds import sample_seed
from stages.run import Run

server = endpoint_server.server
home = endpoint_server.home
rows = sampling.rows
prompts = sampling.prompts


def told(server: Server, **changes: Any) -> dict[str, Any]:
    endpoint = server.endpoint(**changes.pop("endpoint", {})).model_dump()
    return config(**changes) | {"endpoint": endpoint}


@pytest.fixture
def numbered(server: Server) -> Server:
    """Its answer says what was asked, with which seed; every third is cut off."""

    def script(body: Body) -> Answer:
        finish = "length" if body["seed"] % 3 == 0 else "stop"
        return chat(f"{last_message(body)} {body['seed']}", finish, body["seed"] % 50)

    server.script = script
    return server


def test_every_prompt_has_its_samples_in_order(numbered: Server, rows: Rows, prompts: Path, tmp_path: Path) -> None:
    run = run_stage(request_for("sample", tmp_path / "run", told(numbered, seed=3, endpoint={"model": "t"}), prompts=prompts))
    expected = []
    for row in rows:
        for k in range(3):
            seed = sample_seed(3, 0, row["id"], k) % 2**31
            text = f"{row['prompt'][-1]['content']} {seed}"
            finish = "length" if seed % 3 == 0 else "stop"
            expected.append(row | dict(zip(RECORDED, (0, k, text, seed % 50, finish, "t"), strict=True)))
    found = samples(run)
    assert found == expected
    assert list(found[0]) == [*COLUMNS, *RECORDED]
    truncated = sum(row["finish"] == "length" for row in expected)
    mean = sum(row["length"] for row in expected) / 33
    assert metrics(run) == {
        "samples": 33,
        "length": pytest.approx(mean),
        "truncated": truncated / 33,
        "prompts_dropped": 0,
    }
    assert len(numbered.asked) == 33


def test_what_the_teacher_is_asked(server: Server, dataset: Make, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]
    texts = dataset([{"id": "a", "prompt": "plain"}], "texts")
    talks = dataset([{"id": "b", "prompt": talk}], "talks")
    drawn = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 11}
    for given, top_k in ((texts, 0), (talks, 4)):
        chosen = told(server, samples=1, sampling=drawn | {"top_k": top_k})
        run_stage(request_for("sample", tmp_path / str(top_k), chosen, prompts=given))
    common = {"model": "m", "temperature": 0.7, "top_p": 0.9, "max_tokens": 11}
    assert server.asked == [
        common | {"messages": [{"role": "user", "content": "plain"}], "seed": sample_seed(0, 0, "a", 0) % 2**31},
        common | {"messages": talk, "seed": sample_seed(0, 0, "b", 0) % 2**31, "top_k": 4},
    ]


REASONED = [
    (chat("4", reasoning_content="2+2"), "<think>2+2</think>4", "stop"),
    (chat(None, "length", reasoning_content="2+"), "<think>2+", "length"),
    (chat("4", "length", reasoning_content="2+2"), "<think>2+2</think>4", "length"),
    (chat(None, reasoning_content="2+2"), "<think>2+2</think>", "stop"),
    (chat("4", reasoning_content=""), "4", "stop"),
    (chat("<think>a</think>4"), "<think>a</think>4", "stop"),
]


@pytest.mark.parametrize(("answer", "text", "finish"), REASONED)
@pytest.mark.parametrize("keep", [True, False])
def test_reasoning_is_put_back_before_the_answer(
    server: Server, prompts: Path, tmp_path: Path, answer: Answer, text: str, finish: str, keep: bool
) -> None:
    server.script = lambda _: answer
    chosen = told(server, samples=1, prompts=1, keep_reasoning=keep)
    [record] = samples(run_stage(request_for("sample", tmp_path / "run", chosen, prompts=prompts)))
    # What the model writes in its answer itself is left there.
    plain = text if "a</think>" in text else re.sub(r"<think>.*?(</think>|$)", "", text)
    assert (record["completion"], record["finish"]) == (text if keep else plain, finish)


def test_a_server_that_does_not_count_tokens(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.script = lambda body: chat("a", tokens=None if "seed" in body and body["seed"] % 2 else 4)
    run = run_stage(request_for("sample", tmp_path / "run", told(server), prompts=prompts))
    assert {row["length"] for row in samples(run)} == {None, 4}
    assert metrics(run)["length"] == 4
    server.script = lambda _: chat("a", tokens=None)
    run = run_stage(request_for("sample", tmp_path / "none", told(server, endpoint={"model": "n"}), prompts=prompts))
    assert {row["length"] for row in samples(run)} == {None}
    assert "length" not in metrics(run)
    assert str(read_schema(run.folder / "outputs" / "samples").field("length").type) == "int64"


# When it fails.


def test_prompts_that_it_refuses_are_dropped_and_counted(server: Server, rows: Rows, prompts: Path, tmp_path: Path) -> None:
    bad = {rows[place]["prompt"][-1]["content"] for place in (0, 4, 10)}
    # One refusal among a prompt's samples drops the prompt.
    first = sample_seed(0, 0, rows[4]["id"], 1) % 2**31

    def script(body: Body) -> Answer:
        refused = last_message(body) in bad and (
            last_message(body) != rows[4]["prompt"][-1]["content"] or body["seed"] == first
        )
        return failing(400, "too long") if refused else chat("a")

    server.script = script
    run = run_stage(request_for("sample", tmp_path / "run", told(server), prompts=prompts))
    kept = [row["id"] for place, row in enumerate(rows) if place not in (0, 4, 10)]
    assert [row["id"] for row in samples(run)] == [one for one in kept for _ in range(3)]
    assert metrics(run)["prompts_dropped"] == 3
    [message] = events(run.folder, "message")
    assert re.search("refused by the endpoint .*status 400: .*too long", message["text"])


def test_all_refused_is_an_error(server: Server, prompts: Path, tmp_path: Path) -> None:
    server.script = lambda _: failing(422, "Unexpected fields: seed")
    with pytest.raises(InputError, match=r"every prompt was refused by the endpoint \(status 422: .*Unexpected fields"):
        run_stage(request_for("sample", tmp_path / "run", told(server), prompts=prompts))


@pytest.mark.parametrize("answer", [failing(500), Answer("{"), Answer("", after=None)])
def test_one_that_goes_down_stops_the_stage_which_then_goes_on(
    numbered: Server, rows: Rows, prompts: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stage(request_for("sample", tmp_path / "whole", told(numbered), prompts=prompts))
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "other home"))
    healthy = numbered.script
    numbered.script = lambda body: answer if last_message(body) == rows[7]["prompt"][-1]["content"] else healthy(body)
    numbered.asked.clear()
    endpoint = {"timeout": 2 if answer.after is None else 30}
    request = request_for("sample", tmp_path / "broken", told(numbered, endpoint=endpoint), prompts=prompts)
    with pytest.raises(InputError, match=r"the endpoint of m at http://.* start the stage again"):
        run_stage(request)
    assert [event["step"] for event in events(request.folder, "state")] == [2, 4, 6]
    numbered.script = healthy
    resumed = run_stage(request)
    assert digest(resumed) == digest(whole)
    answered = Counter((last_message(body), body["seed"]) for body in numbered.asked)
    failed = rows[7]["prompt"][-1]["content"]
    assert {question: count for question, count in answered.items() if count > 1}.keys() <= {
        question for question in answered if question[0] == failed
    }, "what was answered before is not asked again"


# Again.


def test_a_run_that_is_resumed_or_repeated_asks_nothing_twice(numbered: Server, prompts: Path, tmp_path: Path) -> None:
    request = request_for("sample", tmp_path / "one", told(numbered), prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at("progress", 4))
    assert len(numbered.asked) == 4 * 6
    first = run_stage(request)
    assert len(numbered.asked) == 33
    again = run_stage(request_for("sample", tmp_path / "two", told(numbered, runtime={"save_every": 100}), prompts=prompts))
    assert digest(again) == digest(first)
    assert len(numbered.asked) == 33
    run_stage(request_for("sample", tmp_path / "three", told(numbered, samples=4), prompts=prompts))
    assert len(numbered.asked) == 44, "a fourth sample of each prompt"


def test_no_more_requests_at_a_time_than_are_allowed(numbered: Server, prompts: Path, tmp_path: Path) -> None:
    chosen = told(numbered, endpoint={"concurrency": 2}, runtime={"generation_batch": 33})
    run_stage(request_for("sample", tmp_path / "run", chosen, prompts=prompts))
    assert numbered.peak <= 2


def test_the_key_is_neither_logged_nor_stored(
    server: Server, prompts: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-7")
    server.first = [failing(400, "bad key sk-secret-7")]
    chosen = told(server, endpoint={"api_key": "TEACHER_KEY"})
    request = request_for("sample", tmp_path / "run", chosen, prompts=prompts)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "request.json").write_text(request.model_dump_json())
    run = run_stage(request)
    assert set(server.keys) == {"Bearer sk-secret-7"}
    files = [path for folder in (run.folder, home) for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert b"sk-secret-7" not in path.read_bytes(), path
    assert any("bad key ***" in event["text"] for event in events(run.folder, "message"))
    assert caplog.records
    assert "sk-secret-7" not in caplog.text


# One of the two.


def test_a_policy_or_a_teacher_and_not_both(server: Server, init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    both = request_for("sample", tmp_path / "both", told(server), policy=init_folder, prompts=prompts)
    neither = request_for("sample", tmp_path / "neither", config(), prompts=prompts)
    for request in (both, neither):
        with pytest.raises(InputError, match="needs either a policy as its input or `endpoint` in its config, and not both"):
            run_stage(request)
    assert server.asked == []


def test_the_address_is_not_in_the_samples(numbered: Server, prompts: Path, tmp_path: Path) -> None:
    run: Run = run_stage(request_for("sample", tmp_path / "run", told(numbered), prompts=prompts))
    assert {only(row, "policy")["policy"] for row in samples(run)} == {"m"}
    assert b"127.0.0.1" not in (run.folder / "outputs" / "samples" / "data.parquet").read_bytes()
