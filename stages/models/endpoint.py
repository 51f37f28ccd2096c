"""Asking models behind OpenAI-compatible endpoints: many questions, several at a time, none of them twice.

Answers are kept by content (model, messages, sampling parameters) in one SQLite file, `endpoints.sqlite` in `$POSTTRAIN_HOME`,
as soon as they arrive: a stage that is resumed or repeated, on any of its processes, gets the same answers without asking.
What failed is not kept.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from stages.artifacts import digest_of
from stages.errors import InputError
from stages.specs.common import Endpoint

if TYPE_CHECKING:
    from openai import OpenAI

Body = dict[str, Any]
REFUSED = (400, 413, 422)  # This request is at fault, not the endpoint.
PATIENCE = 3  # At least so many requests in a row come to nothing before the rest of a batch is not asked any more.


class Reply(BaseModel):
    """An answer: its text, the reasoning where it came apart from it, whether it was cut off, its length in tokens if told."""

    text: str
    reasoning: str | None
    truncated: bool
    tokens: int | None


@dataclass(frozen=True)
class Failure:
    """Why there is no answer. `down`: it is the endpoint's state; otherwise it refused this one request."""

    reason: str
    down: bool


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int


class _Answer(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    def reply(self) -> Reply:
        choice, usage = self.choices[0], self.usage
        return Reply(
            text=choice.message.content or "",
            reasoning=choice.message.reasoning_content or choice.message.reasoning,
            truncated=choice.finish_reason not in (None, "stop"),
            tokens=None if usage is None else usage.completion_tokens,
        )


def request_body(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]], **parameters: Any) -> Body:
    """A chat completion's request: these parameters, with the endpoint's `extra_body` over them; null leaves a field out."""
    given = {"model": endpoint.model, "messages": [dict(one) for one in messages], **parameters, **endpoint.extra_body}
    return {name: value for name, value in given.items() if value is not None}


def ask(endpoint: Endpoint, bodies: Sequence[Body]) -> list[Reply | Failure]:
    """The answer to each request, in order; equal requests get one answer.

    Raises InputError when the `openai` package or the key is missing. An endpoint that is down, slow or answers nonsense gives
    Failures; once a few requests in a row came to nothing, the rest is not asked.
    """
    keys = [digest_of(body) for body in bodies]
    wanted = dict(zip(keys, bodies, strict=True))
    with _kept_answers() as kept:
        found: dict[str, Reply | Failure] = {key: reply for key in wanted if (reply := kept.get(key)) is not None}
        missing = {key: body for key, body in wanted.items() if key not in found}
        if missing:
            for key, answer in _answers(endpoint, missing):
                found[key] = kept.put(key, endpoint.model, answer) if isinstance(answer, Reply) else answer
    return [found[key] for key in keys]


def no_answers(endpoint: Endpoint, failures: Sequence[Failure]) -> InputError:
    """The error of a stage that cannot go on without the endpoint."""
    key = "" if endpoint.api_key is None else f", and its key in the environment variable {endpoint.api_key}"
    return InputError(
        f"the endpoint of {endpoint.model} at {endpoint.url} left {len(failures)} requests without an answer; the last: "
        f"{failures[-1].reason}. Check that it runs, its url, the model's name{key}; then start the stage again: "
        "it goes on, and what has been answered is not asked again"
    )


def _answers(endpoint: Endpoint, bodies: Mapping[str, Body]) -> Iterator[tuple[str, Reply | Failure]]:
    """Key and answer of each request as they come in, at most `concurrency` of them on their way."""
    with _client(endpoint) as client, ThreadPoolExecutor(endpoint.concurrency) as pool:
        line = _Line(endpoint, client)
        waiting = {pool.submit(line.ask, body): key for key, body in bodies.items()}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _client(endpoint: Endpoint) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise InputError(
            "an endpoint is asked through the package `openai`, which is not installed: pip install openai"
        ) from error
    # Given even where there is none: the package would look for one in the environment by itself.
    return OpenAI(
        base_url=endpoint.url, api_key=_key(endpoint) or "none", timeout=endpoint.timeout, max_retries=endpoint.retries
    )


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.api_key is None:
        return None
    if not (key := os.environ.get(endpoint.api_key, "").strip()):
        raise InputError(
            f"the environment variable {endpoint.api_key}, which holds the key of the endpoint of {endpoint.model}, is not set "
            "where the stage runs"
        )
    return key


class _Line:
    """The line to an endpoint, which notices that nobody answers any more."""

    def __init__(self, endpoint: Endpoint, client: OpenAI) -> None:
        self.endpoint, self.client = endpoint, client
        self.silent: list[Failure] = []

    def ask(self, body: Body) -> Reply | Failure:
        if len(self.silent) >= max(PATIENCE, self.endpoint.concurrency):
            return self.silent[-1]
        answer = self._ask(body)
        if isinstance(answer, Failure) and answer.down:
            self.silent.append(answer)
        else:
            self.silent = []
        return answer

    def _ask(self, body: Body) -> Reply | Failure:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        others = {name: value for name, value in body.items() if name not in ("model", "messages")}
        chat = self.client.chat.completions.with_raw_response
        try:
            raw = chat.create(model=body["model"], messages=body["messages"], extra_body=others)
            return _Answer.model_validate_json(raw.http_response.content).reply()
        except APITimeoutError:
            return Failure(f"no answer within {self.endpoint.timeout:g} seconds, {self.endpoint.retries + 1} times", down=True)
        except APIConnectionError as error:
            return Failure(self._said(f"cannot be reached ({error.__cause__ or error})"), down=True)
        except APIStatusError as error:
            return Failure(self._said(f"status {error.status_code}: {error.response.text}"), error.status_code not in REFUSED)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, wrong["loc"]))
            return Failure(f"what came is no chat completion ({place}{': ' if place else ''}{wrong['msg']})", down=True)

    def _said(self, text: str) -> str:
        """In one line, without the key: some servers repeat the one that they refuse."""
        key = _key(self.endpoint)
        return " ".join((text if key is None else text.replace(key, "***")).split())[:300]


class _KeptAnswers:
    """Answers by key. Used by one thread; SQLite's locks order the other threads and processes."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def get(self, key: str) -> Reply | None:
        row = self.database.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply.model_validate_json(row[0])

    def put(self, key: str, model: str, reply: Reply) -> Reply:
        """Keep an answer. When another process asked the same meanwhile, the first answer counts, for both."""
        with self.database:
            row = (key, model, reply.model_dump_json())
            self.database.execute("INSERT OR IGNORE INTO answers (key, model, reply) VALUES (?, ?, ?)", row)
        return self.get(key) or reply


def answers_file() -> Path:
    """Where answers are kept: in `$POSTTRAIN_HOME`, by default `.posttrain` in the working directory."""
    return Path(os.environ.get("POSTTRAIN_HOME", ".posttrain")) / "endpoints.sqlite"


@contextmanager
def _kept_answers() -> Iterator[_KeptAnswers]:
    file = answers_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file, timeout=60)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, reply TEXT) WITHOUT ROWID")
            yield _KeptAnswers(database)
    except sqlite3.Error as error:
        raise InputError(
            f"{file}, where the answers of endpoints are kept, cannot be used ({error}); delete or free it"
        ) from error
