"""Answers are kept by content: nothing is asked twice, by whomever, whenever; another question is another one."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import endpoint_server
import pytest
from endpoint_server import Answer, Server, chat, failing, last_message

from stages.errors import InputError
from stages.models.endpoint import Failure, Reply, answers_file, ask, request_body
from stages.specs.common import Endpoint

server = endpoint_server.server
home = endpoint_server.home


def texts(endpoint: Endpoint, *questions: str, **parameters: Any) -> list[str]:
    messages = [[{"role": "user", "content": text}] for text in questions]
    answers = ask(endpoint, [request_body(endpoint, one, **parameters) for one in messages])
    return [one.text if isinstance(one, Reply) else f"failed: {one.reason}" for one in answers]


def kept() -> int:
    """The number of answers that are kept."""
    if not answers_file().is_file():
        return 0
    with closing(sqlite3.connect(answers_file())) as database:
        table = database.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,)
        return database.execute("SELECT count(*) FROM answers").fetchone()[0] if table else 0


def count_up(server: Server) -> None:
    """Each answer is another one, as a model's that is sampled without a seed."""
    server.script = lambda body: chat(f"{last_message(body)} {len(server.asked)}")


def test_a_question_is_asked_once(server: Server) -> None:
    count_up(server)
    endpoint = server.endpoint(concurrency=1)
    first = texts(endpoint, "a", "b", "a", "a")
    assert first == ["a 1", "b 2", "a 1", "a 1"]
    assert texts(endpoint, "b", "c", "a") == ["b 2", "c 3", "a 1"]
    assert len(server.asked) == 3


def test_another_place_key_or_patience_is_the_same_question(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    count_up(server)
    assert texts(server.endpoint(), "a") == ["a 1"]
    monkeypatch.setenv("OTHER_KEY", "k")
    others = [{"url": "http://127.0.0.1:9/v1"}, {"api_key": "OTHER_KEY"}, {"timeout": 1.0}, {"retries": 3}, {"concurrency": 1}]
    for change in others:
        assert texts(server.endpoint(**change), "a") == ["a 1"], change
    assert len(server.asked) == 1


def test_what_can_change_the_answer_is_another_question(server: Server) -> None:
    count_up(server)
    texts(server.endpoint(), "a", seed=1, temperature=1.0)
    texts(server.endpoint(), "a", seed=2, temperature=1.0)
    texts(server.endpoint(), "a", seed=1, temperature=0.5)
    texts(server.endpoint(model="n"), "a", seed=1, temperature=1.0)
    texts(server.endpoint(extra_body={"top_k": 3}), "a", seed=1, temperature=1.0)
    ask(server.endpoint(), [request_body(server.endpoint(), [{"role": "system", "content": "a"}], seed=1, temperature=1.0)])
    assert len(server.asked) == 6
    texts(server.endpoint(), "a", temperature=1.0, seed=1)
    assert len(server.asked) == 6


def test_failures_are_asked_again(server: Server) -> None:
    endpoint = server.endpoint()
    server.first = [failing(500), failing(400), chat("late")]
    assert [texts(endpoint, "a")[0][:6] for _ in range(4)] == ["failed", "failed", "late", "late"]


def test_what_arrived_before_a_kill_is_kept(server: Server) -> None:
    """The third question is never answered, and its process is killed."""
    server.script = lambda body: Answer("", after=None) if last_message(body) == "c" else chat(last_message(body))
    endpoint = server.endpoint(concurrency=1, timeout=100.0)
    child = multiprocessing.get_context("spawn").Process(target=texts, args=(endpoint, "a", "b", "c"))
    child.start()
    deadline = time.monotonic() + 60
    while kept() < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert kept() == 2
    assert texts(endpoint, "b", "a") == ["b", "a"]
    assert [last_message(body) for body in server.asked[:2]] == ["a", "b"]
    assert [last_message(body) for body in server.asked[2:]] in ([], ["c"])


def test_it_outlives_the_process(server: Server) -> None:
    count_up(server)
    endpoint = server.endpoint()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(texts, (endpoint, "a", "b")) is not None
    before = len(server.asked)
    texts(endpoint, "b", "a")
    assert len(server.asked) == before == 2


def test_several_processes_that_begin_at_once_share_it(server: Server) -> None:
    count_up(server)
    endpoint, questions = server.endpoint(concurrency=2), [str(n) for n in range(40)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        found = pool.starmap(texts, [(endpoint, *questions)] * 6, chunksize=1)
    final = texts(endpoint, *questions)
    assert found == [final] * 6, "whoever asked the same meanwhile ends with the first answer"
    assert kept() == 40


def test_of_two_answers_to_one_question_the_first_counts_for_both(server: Server) -> None:
    """Two threads ask before either is answered."""
    endpoint, together = server.endpoint(), threading.Barrier(2, timeout=20)
    counted = iter("12")

    def script(body: dict[str, Any]) -> Answer:
        together.wait()
        return chat(next(counted))

    server.script = script
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: texts(endpoint, "a"), range(2)))
    assert len(server.asked) == 2
    assert found[0] == found[1]


def test_many_threads_at_once(server: Server) -> None:
    endpoint = server.endpoint(concurrency=2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: texts(endpoint, *(str(n + k) for k in range(5))), range(20)))
    assert found == [[f"echo {n + k}" for k in range(5)] for n in range(20)]


def test_it_is_in_the_state_folder(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts(server.endpoint(), "a")
    assert [path.name for path in home.iterdir()] == ["endpoints.sqlite"]
    monkeypatch.delenv("POSTTRAIN_HOME")
    monkeypatch.chdir(tmp_path)
    texts(server.endpoint(), "a")
    assert (tmp_path / ".posttrain" / "endpoints.sqlite").is_file()
    assert len(server.asked) == 2


def test_the_key_is_not_kept(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    texts(server.endpoint(api_key="JUDGE_KEY"), "a")
    assert server.keys == ["Bearer sk-secret"]
    [file] = home.iterdir()
    assert b"echo a" in file.read_bytes()
    assert b"sk-secret" not in file.read_bytes()


def test_a_file_that_is_damaged_is_named(server: Server, home: Path) -> None:
    home.mkdir()
    answers_file().write_bytes(b"no database " * 1000)
    with pytest.raises(InputError, match=r"endpoints\.sqlite, .* cannot be used \(file is not a database\)"):
        texts(server.endpoint(), "a")


def test_nothing_is_asked_for_nothing(server: Server) -> None:
    assert ask(server.endpoint(), []) == []
    assert not any(isinstance(one, Failure) for one in ask(server.endpoint(), []))
    assert server.asked == []
