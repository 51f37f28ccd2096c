"""A judge: a model behind an OpenAI-compatible endpoint rates each completion by a rubric, and its rating is read out of its
reply.

The default rubric is the single-answer grading of MT-Bench (Zheng et al. 2023, arXiv 2306.05685, figure 6). The completion
stands between marks that are a hash of it, so it cannot close them, and nothing but the judge's reply is searched for a rating.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from stages.models.endpoint import Body, Failure, Reply, ask, no_answers, request_body
from stages.rewards.base import Row, Score
from stages.specs.base import Config
from stages.specs.common import Endpoint

HELPFULNESS = """\
Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user question \
displayed below. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and \
level of detail of the response. Begin your evaluation by providing a short explanation. Be as objective as possible. After \
providing your explanation, please rate the response on a scale of {lowest} to {highest} by strictly following this format: \
"[[rating]]", for example: "Rating: [[5]]".\
"""


class JudgeArgs(Config):
    """Who judges, by what, and how the rating is read."""

    endpoint: Endpoint = Field(title="Endpoint", description="The judge.")
    rubric: str = Field(
        default=HELPFULNESS,
        min_length=1,
        title="Rubric",
        description="What it is told, as its system message; {lowest} and {highest} are put in. MT-Bench's when unset.",
    )
    pattern: str = Field(
        default=r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]",
        title="Pattern",
        description="Regular expression of a rating, with one group, its number; the last one in the reply counts.",
    )
    lowest: float = Field(default=1.0, title="Lowest", description="The rating that becomes 0.")
    highest: float = Field(default=10.0, title="Highest", description="The rating that becomes 1.")
    max_new_tokens: int = Field(default=1024, ge=1, title="New tokens", description="A reply that is longer is no verdict.")

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"{pattern!r} has {groups} groups; it needs one, around the rating's number")
        return pattern

    @model_validator(mode="after")
    def _scale(self) -> JudgeArgs:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest:g}) must be below highest ({self.highest:g})")
        return self


def judge(completions: Sequence[str], rows: Sequence[Row], **args: Any) -> list[Score | None]:
    """The judge's rating of each completion, from 0 to 1; None where it gave none. `args`: see `JudgeArgs`.

    Raises InputError when it answered nothing at all, or its key or the `openai` package is missing.
    """
    found = verdicts(completions, rows, JudgeArgs.model_validate(args))
    return [Score(None, note=why) if score is None else score for score, why in found]


def verdicts(completions: Sequence[str], rows: Sequence[Row], args: JudgeArgs) -> list[tuple[Score | None, str]]:
    """(score, "") or (None, why there is none) for each completion."""
    answers = ask(args.endpoint, [_question(text, row, args) for text, row in zip(completions, rows, strict=True)])
    failures = [one for one in answers if isinstance(one, Failure)]
    if failures and len(failures) == len(answers):
        raise no_answers(args.endpoint, failures)
    return [(None, f"no answer: {one.reason}") if isinstance(one, Failure) else read_rating(one, args) for one in answers]


def read_rating(reply: Reply, args: JudgeArgs) -> tuple[Score | None, str]:
    """The rating in a judge's reply, from 0 to 1, or None and why there is none."""
    if reply.truncated:
        # What such a reply ends with may be a quotation.
        return None, f"reply cut off: after {args.max_new_tokens} tokens"
    found = re.findall(args.pattern, reply.text)
    if not found:
        return None, f"no rating: {reply.text[-200:]!r}"
    try:
        rating = float(found[-1])
    except ValueError:
        return None, f"rating is no number: {found[-1]!r}"
    if not args.lowest <= rating <= args.highest:
        return None, f"rating out of range: {rating:g} is not from {args.lowest:g} to {args.highest:g}"
    return Score((rating - args.lowest) / (args.highest - args.lowest)), ""


def _question(completion: str, row: Row, args: JudgeArgs) -> Body:
    rubric = args.rubric.replace("{lowest}", f"{args.lowest:g}").replace("{highest}", f"{args.highest:g}")
    asked = _conversation(row["prompt"])
    mark = hashlib.sha256(f"{asked}\n{completion}".encode()).hexdigest()[:8]
    shown = (
        f"[The Start of the User's Question {mark}]\n{asked}\n[The End of the User's Question {mark}]\n\n"
        f"[The Start of Assistant's Answer {mark}]\n{completion}\n[The End of Assistant's Answer {mark}]"
    )
    messages = [{"role": "system", "content": rubric}, {"role": "user", "content": shown}]
    return request_body(args.endpoint, messages, temperature=0, max_tokens=args.max_new_tokens)


def _conversation(prompt: str | Sequence[Row]) -> str:
    """A prompt as text: one message of a user as it is, several with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
