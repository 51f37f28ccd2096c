"""Sampling completions from a teacher behind an endpoint: text in, text out, each sample with its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.data.recorded import recorded
from stages.models.endpoint import Body, Failure, Reply, ask, no_answers, request_body
from stages.rollouts.sample import Placed, Row
from stages.rollouts.seeds import sample_seed
from stages.specs.common import Endpoint, Sampling

# Servers take seeds of 32 or 64 bits, signed or not; all take these.
SEEDS = 2**31


def ask_teacher(
    endpoint: Endpoint, rows: Sequence[Row], sampling: Sampling, seed: int, samples: int, keep_reasoning: bool
) -> tuple[list[Placed], list[str]]:
    """Records of `samples` completions of each row, in order of rows, and of each row that the endpoint refuses its reason.

    Their `length` is in the teacher's tokens, None when it does not count them; `policy` is its name. Raises InputError when it
    does not answer: the stage can be resumed then.
    """
    wanted = [(place, k) for place in range(len(rows)) for k in range(samples)]
    answers = ask(endpoint, [_request(endpoint, rows[place], sampling, seed, k) for place, k in wanted])
    if down := [one for one in answers if isinstance(one, Failure) and one.down]:
        raise no_answers(endpoint, down)
    refused = {place: one.reason for (place, _), one in zip(wanted, answers, strict=True) if isinstance(one, Failure)}
    records: list[Placed] = []
    for (place, k), one in zip(wanted, answers, strict=True):
        if isinstance(one, Reply) and place not in refused:
            finish, text = "length" if one.truncated else "stop", _text(one, keep_reasoning)
            records.append((place, recorded(rows[place], 0, k, text, one.tokens, finish, endpoint.model)))
    return records, list(refused.values())


def _request(endpoint: Endpoint, row: Row, sampling: Sampling, seed: int, number: int) -> Body:
    prompt: Any = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return request_body(
        endpoint,
        # Parquet gives every message all fields that any has.
        [{name: value for name, value in message.items() if value is not None} for message in messages],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or None,
        max_tokens=sampling.max_new_tokens,
        seed=sample_seed(seed, 0, row["id"], number) % SEEDS,
    )


def _text(reply: Reply, keep_reasoning: bool) -> str:
    """The answer, with the reasoning before it as the model wrote it; thinking that was cut off is not closed."""
    if not (keep_reasoning and reply.reasoning):
        return reply.text
    unfinished = reply.truncated and not reply.text
    return f"<think>{reply.reasoning}" if unfinished else f"<think>{reply.reasoning}</think>{reply.text}"
