"""A real HTTP server that speaks as an OpenAI-compatible endpoint and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stages.specs.common import Endpoint

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A response. `after` seconds pass before it; None: never, the connection is left without one until the server ends."""

    text: str
    status: int = 200
    after: float | None = 0.0
    kind: str = "application/json"


Script = Callable[[Body], Answer]


def chat(text: str | None, finish: str | None = "stop", tokens: int | None = 7, after: float = 0.0, **message: Any) -> Answer:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    if tokens is not None:
        body["usage"] = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}
    return Answer(json.dumps(body), after=after)


def failing(status: int, text: str = "") -> Answer:
    return Answer(json.dumps({"error": {"message": text, "type": "x"}}), status=status)


def last_message(body: Body) -> str:
    return str(body["messages"][-1]["content"])


@dataclass
class Server:
    """What was asked, by whom, and how many requests were there at a time. `first` answers come before those of `script`."""

    port: int
    script: Script = lambda body: chat(f"echo {last_message(body)}")
    first: list[Answer] = field(default_factory=list)
    asked: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    present: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def endpoint(self, **changes: Any) -> Endpoint:
        """One that is not patient with it."""
        return Endpoint(**{"model": "m", "url": self.url, "retries": 0, "timeout": 10.0} | changes)

    def begin(self, body: Body, key: str) -> Answer:
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.present += 1
            self.peak = max(self.peak, self.present)
            answer = self.first.pop(0) if self.first else None
        return answer or self.script(body)

    def end(self) -> None:
        with self.lock:
            self.present -= 1


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        told: Server = self.server.told
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = told.begin(body, self.headers["authorization"])
        if answer.after is None:
            told.ended.wait()
        else:
            time.sleep(answer.after)
        told.end()
        data = answer.text.encode()
        try:
            self.send_response(answer.status)
            self.send_header("content-type", answer.kind)
            self.send_header("content-length", str(len(data)))
            # Waits between tries as short as can be.
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    told: Server


@contextmanager
def serving() -> Iterator[Server]:
    with Http(("127.0.0.1", 0), Handler) as http:
        http.told = told = Server(http.server_port)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield told
        finally:
            told.ended.set()
            http.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as told:
        yield told


@pytest.fixture(autouse=True)
def home(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place of its own for the kept answers of each test."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
