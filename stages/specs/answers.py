"""`answers`: what people answered on the page of `questions`, as pairs in the form that `label` writes."""

from __future__ import annotations

from pydantic import Field

from stages.specs.base import Config, Port, StageSpec


class AnswersConfig(Config):
    """How many answers make a pair, and how many pairs are held out."""

    annotators: int = Field(
        default=1,
        ge=1,
        title="Annotators",
        description="A question needs the answers of at least so many annotators; with fewer it makes no pair, and is counted.",
    )
    heldout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        title="Held-out share",
        description="Share of prompts whose preferences are held out, by a hash of the prompt, as in `label`: what both "
        "label is on the same side.",
    )


SPEC = StageSpec(
    name="answers",
    version=1,
    config=AnswersConfig,
    inputs={"questions": Port("dataset"), "answers": Port("dataset")},
    outputs={"train": "dataset", "heldout": "dataset"},
    headline=("rows_train", "rows_heldout", "agreement", "alpha"),
)
