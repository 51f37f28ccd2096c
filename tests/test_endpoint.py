"""Asking an endpoint: what is sent, what comes of each way in which it fails, order, side by side."""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any

import endpoint_server
import pytest
from endpoint_server import Answer, Server, chat, failing, last_message
from pydantic import ValidationError

from stages.errors import InputError
from stages.models.endpoint import Failure, Reply, ask, no_answers, request_body
from stages.specs.common import Endpoint

server = endpoint_server.server
home = endpoint_server.home


def bodies(endpoint: Endpoint, *texts: str) -> list[dict[str, Any]]:
    return [request_body(endpoint, [{"role": "user", "content": text}], temperature=0, max_tokens=5) for text in texts]


def replies(answers: list[Reply | Failure]) -> list[str]:
    assert all(isinstance(one, Reply) for one in answers), answers
    return [one.text for one in answers if isinstance(one, Reply)]


def only_failure(answers: list[Reply | Failure]) -> Failure:
    [answer] = answers
    assert isinstance(answer, Failure)
    return answer


def test_a_request_is_what_the_endpoint_gets(server: Server) -> None:
    endpoint = server.endpoint(extra_body={"top_k": 5, "max_tokens": None, "temperature": 0.5})
    [body] = bodies(endpoint, "hello")
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "top_k": 5}
    [answer] = ask(endpoint, [body])
    assert server.asked == [body]
    assert answer == Reply(text="echo hello", reasoning=None, truncated=False, tokens=7)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (chat("a", "length", 12), Reply(text="a", reasoning=None, truncated=True, tokens=12)),
        (chat("a", "content_filter"), Reply(text="a", reasoning=None, truncated=True, tokens=7)),
        (chat("a", None, None), Reply(text="a", reasoning=None, truncated=False, tokens=None)),
        (chat(None), Reply(text="", reasoning=None, truncated=False, tokens=7)),
        (chat("a", reasoning_content="why"), Reply(text="a", reasoning="why", truncated=False, tokens=7)),
        (chat("a", reasoning="why"), Reply(text="a", reasoning="why", truncated=False, tokens=7)),
        (chat("é\u2028\x00"), Reply(text="é\u2028\x00", reasoning=None, truncated=False, tokens=7)),
    ],
)
def test_replies(server: Server, answer: Answer, expected: Reply) -> None:
    server.first = [answer]
    endpoint = server.endpoint()
    assert ask(endpoint, bodies(endpoint, "x")) == [expected]
    assert ask(endpoint, bodies(endpoint, "x")) == [expected], "kept as it was"


@pytest.mark.parametrize(
    ("first", "retries"),
    [([failing(500)] * 2, 2), ([failing(429)], 1), ([failing(503), failing(429), failing(408)], 3), ([failing(502)], 4)],
)
def test_it_tries_again(server: Server, first: list[Answer], retries: int) -> None:
    server.first = list(first)
    endpoint = server.endpoint(retries=retries)
    assert replies(ask(endpoint, bodies(endpoint, "x"))) == ["echo x"]
    assert len(server.asked) == len(first) + 1


@pytest.mark.parametrize("status", [500, 429])
def test_it_does_not_try_for_ever(server: Server, status: int) -> None:
    server.first = [failing(status, "no room")] * 9
    endpoint = server.endpoint(retries=2)
    failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert failure.down
    assert f"status {status}" in failure.reason
    assert "no room" in failure.reason
    assert len(server.asked) == 3


def test_a_slow_one_is_given_up(server: Server) -> None:
    server.first = [Answer("", after=None)]
    endpoint = server.endpoint(timeout=0.2)
    failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert failure == Failure("no answer within 0.2 seconds, 1 times", down=True)
    patient = server.endpoint()
    assert replies(ask(patient, bodies(patient, "x"))) == ["echo x"], "a failure is not kept"


def test_nobody_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Not listening: refused.
        endpoint = Endpoint(model="m", url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=0)
        failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert failure.down
    assert "cannot be reached" in failure.reason
    assert "refused" in failure.reason


@pytest.mark.parametrize(
    "answer",
    [
        Answer("{nonsense"),
        Answer(""),
        Answer("<html>Bad gateway</html>", kind="text/html"),
        Answer("{}"),
        Answer("null"),
        Answer('{"choices": []}'),
        Answer('{"choices": [{"message": null}]}'),
        Answer('{"choices": [{"message": {"content": 5}}]}'),
        Answer('{"choices": null, "error": {"message": "overloaded"}}'),
    ],
    ids=lambda answer: answer.text,
)
def test_an_answer_that_is_no_chat_completion(server: Server, answer: Answer) -> None:
    server.first = [answer]
    endpoint = server.endpoint()
    failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert failure.down
    assert "what came is no chat completion" in failure.reason
    assert replies(ask(endpoint, bodies(endpoint, "x"))) == ["echo x"]


@pytest.mark.parametrize(("status", "down"), [(400, False), (413, False), (422, False), (401, True), (403, True), (404, True)])
def test_a_request_that_is_refused_is_not_the_endpoint_s_state(server: Server, status: int, down: bool) -> None:
    server.first = [failing(status, "too long")]
    endpoint = server.endpoint(retries=3)
    failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert failure.down == down
    assert "too long" in failure.reason
    assert len(server.asked) == 1


def test_answers_keep_the_order_of_the_requests(server: Server) -> None:
    """Whatever the order in which they come."""
    server.script = lambda body: chat(last_message(body), after=0.05 * (5 - int(last_message(body))))
    endpoint = server.endpoint(concurrency=6)
    texts = ["3", "0", "5", "1", "4", "2"]
    assert replies(ask(endpoint, bodies(endpoint, *texts))) == texts


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_are_allowed(server: Server, concurrency: int) -> None:
    together = threading.Barrier(concurrency, timeout=20)

    def script(body: dict[str, Any]) -> Answer:
        together.wait()
        return chat("a")

    server.script = script
    endpoint = server.endpoint(concurrency=concurrency)
    replies(ask(endpoint, bodies(endpoint, *map(str, range(9)))))
    assert server.peak == concurrency


def test_some_fail_and_the_others_are_answered(server: Server) -> None:
    server.script = lambda body: failing(400, "no") if last_message(body) in "bd" else chat(last_message(body))
    endpoint = server.endpoint()
    found = ask(endpoint, bodies(endpoint, *"abcde"))
    assert [one.text if isinstance(one, Reply) else one.down for one in found] == ["a", False, "c", False, "e"]


def test_a_dead_endpoint_is_not_asked_for_everything(server: Server) -> None:
    server.script = lambda _: failing(500, "dead")
    endpoint = server.endpoint(concurrency=5)
    found = ask(endpoint, bodies(endpoint, *map(str, range(100))))
    assert len(server.asked) in range(5, 10), "five in a row, while up to four others were on their way"
    assert {one.reason[:10] for one in found if isinstance(one, Failure)} == {"status 500"}
    assert len(found) == 100


def test_failures_among_answers_do_not_end_it(server: Server) -> None:
    """Nor requests that are refused, however many in a row."""
    server.script = lambda body: chat("a") if int(last_message(body)) % 3 == 0 else failing(500)
    endpoint = server.endpoint(concurrency=1)
    found = ask(endpoint, bodies(endpoint, *map(str, range(12))))
    assert [isinstance(one, Reply) for one in found] == [n % 3 == 0 for n in range(12)]
    assert len(server.asked) == 12
    server.script = lambda _: failing(400)
    ask(endpoint, bodies(endpoint, *map(str, range(20, 32))))
    assert len(server.asked) == 24


# Keys.


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", " sk-one\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    for endpoint in (server.endpoint(api_key="JUDGE_KEY"), server.endpoint(model="n")):
        ask(endpoint, bodies(endpoint, "x"))
    assert server.keys == ["Bearer sk-one", "Bearer none"]


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_key_that_is_not_set(server: Server, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    endpoint = server.endpoint(api_key="JUDGE_KEY")
    with pytest.raises(InputError, match=r"the environment variable JUDGE_KEY, .* is not set"):
        ask(endpoint, bodies(endpoint, "x"))
    assert server.asked == []


def test_a_key_that_the_server_repeats_is_not_passed_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.first = [failing(401, "wrong key: sk-secret")]
    endpoint = server.endpoint(api_key="JUDGE_KEY")
    failure = only_failure(ask(endpoint, bodies(endpoint, "x")))
    assert "wrong key: ***" in failure.reason
    assert "JUDGE_KEY" in str(no_answers(endpoint, [failure]))


@pytest.mark.parametrize("given", ["sk-abc", "hf_AbCdEf", "", "A B", "1A"])
def test_a_key_itself_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="never the key itself"):
        Endpoint(model="m", url="http://a/v1", api_key=given)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://me:key@host/v1", "http://host/v1?key=key", "http://a b", ""])
def test_a_url_is_a_plain_one(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        Endpoint(model="m", url=url)


def test_without_the_package(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    endpoint = server.endpoint()
    with pytest.raises(InputError, match="pip install openai"):
        ask(endpoint, bodies(endpoint, "x"))
