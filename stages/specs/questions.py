"""`questions`: pairs of samples for people to compare, as Parquet and as a page that shows them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.specs.base import Config, Port, StageSpec


class QuestionsConfig(Config):
    """Which pairs are asked. Every annotator gets the same questions in the same order, so that whoever answers only some of
    them answers what others do too, and their agreement can be told."""

    seed: int = Field(
        default=0, title="Seed", description="Seed of the order of the questions, of their sides, and of what is left out."
    )
    limit: int | None = Field(
        default=200,
        ge=1,
        title="At most",
        description="Questions at most, a random choice among all pairs; empty: all of them.",
    )
    pairs: Literal["all", "one"] = Field(
        default="one",
        title="Which pairs",
        description="one: two completions of each prompt, at random; all: every two completions of a prompt.",
    )
    part: Literal["completion", "answer"] = Field(
        default="completion",
        title="Part",
        description="answer: people, and the preferences, see only the final answer, not the thinking before it.",
    )
    instruction: str = Field(
        default="Which of the two answers is better?",
        min_length=1,
        title="Instruction",
        description="What stands at the top of the page.",
    )


SPEC = StageSpec(
    name="questions",
    version=1,
    config=QuestionsConfig,
    inputs={"samples": Port("dataset")},
    outputs={"questions": "dataset"},
    headline=("questions", "prompts"),
)
