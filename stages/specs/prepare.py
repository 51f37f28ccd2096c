"""`prepare`: any source of rows to a canonical dataset, split into train and held-out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.specs.base import Config, Port, StageSpec
from stages.specs.texts import Texts


class Filters(Config):
    """Rows to leave out; each filter reports how many it took. Lengths are in characters."""

    min_prompt_chars: int = Field(
        default=0,
        ge=0,
        title="Shortest prompt",
        description="Drop rows whose prompt has fewer characters, all messages together.",
    )
    max_prompt_chars: int | None = Field(
        default=None, ge=1, title="Longest prompt", description="Drop rows whose prompt has more, all messages together."
    )
    min_completion_chars: int = Field(
        default=0,
        ge=0,
        title="Shortest completion",
        description="Drop rows with a completion, chosen or rejected of fewer characters.",
    )
    max_completion_chars: int | None = Field(
        default=None, ge=1, title="Longest completion", description="Drop rows with a completion, chosen or rejected of more."
    )
    equals: Texts = Field(
        default_factory=dict,
        title="Keep where",
        description="column: value, column: value (lang: en): rows whose column, as text, differs are dropped.",
    )


class Slice(Config):
    """A part of an endless stream of the training prompts: one seeded permutation of all of them after another."""

    seed: int = Field(default=0, title="Seed", description="Seed of the permutations.")
    start: int = Field(
        default=0, ge=0, title="Start", description="Position in the stream: how many prompts were taken before."
    )
    count: int = Field(
        default=100,
        ge=1,
        title="Count",
        description="Prompts to take. Over the end of a permutation one may come up twice, and is then taken once.",
    )


class PrepareConfig(Config):
    """Reads JSONL (gzipped too), JSON, CSV, Parquet, a hub dataset or a procedural source."""

    seed: int = Field(default=0, title="Seed", description="Seed of a procedural source.")
    rows: int | None = Field(
        default=None, ge=1, title="Rows", description="Rows to generate (procedural source, which needs it) or to read at most."
    )
    config: str | None = Field(
        default=None,
        title="Hub config",
        description="Config name of a hub dataset that has several, or the folder of it to read (HH-RLHF: harmless-base).",
    )
    split: str = Field(default="train", title="Hub split", description="Split of a hub dataset that has several.")
    columns: Texts = Field(
        default_factory=dict,
        title="Columns",
        description="canonical name: name in the source, and so on (prompt: question, completion: answer). Others are kept as "
        "they are.",
    )
    chat: bool = Field(
        default=False, title="As chat", description="Make a text prompt one user message, so that the chat template applies."
    )
    system: str | None = Field(
        default=None, title="System message", description="Put this system message before prompts made of messages."
    )
    template: str | None = Field(
        default=None,
        pattern=r"^r1-zero$|\{prompt\}",
        title="Template",
        description="Text around each text prompt, which takes the place of {prompt}; r1-zero: DeepSeek-R1-Zero's, for base "
        "models without a chat template (rl4llm, table 1).",
    )
    constants: Texts = Field(
        default_factory=dict,
        title="Constants",
        description="column: value, column: value; every row gets them. domain: general, say: rewards can be chosen by it.",
    )
    extract: Literal["none", "gsm8k"] = Field(
        default="none",
        title="Extract an answer",
        description="gsm8k: the text after #### in the completion (or in the answer column) becomes the column `answer`.",
    )
    form: Literal["as_given", "demonstrations", "prompts"] = Field(
        default="as_given",
        title="Form",
        description="demonstrations: the chosen answer of a preference becomes its completion; prompts: only the prompt stays. "
        "So one source of preferences serves SFT, the reward model and RL.",
    )
    unusable: Literal["refuse", "drop"] = Field(
        default="refuse",
        title="Unusable rows",
        description="A row with an empty or wrongly typed column stops the stage, or is dropped, counted by its reason.",
    )
    keep_empty: bool = Field(
        default=False,
        title="Keep empty completions",
        description="An empty completion, chosen or rejected is usable too: a policy may say nothing, and lose by it.",
    )
    filters: Filters = Field(default_factory=Filters, title="Filters", description="Rows to leave out.")
    deduplicate: bool = Field(
        default=True, title="De-duplicate", description="Keep the first of rows whose canonical columns are equal."
    )
    heldout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        title="Held-out share",
        description="Share of prompts held out, by a hash of their content, so that new rows never move an old one.",
    )
    split_by: str = Field(
        default="prompt",
        title="Split by",
        description="Column whose content decides the side; rows that share it stay together.",
    )
    max_heldout: int | None = Field(
        default=None, ge=1, title="Held-out rows", description="Keep at most so many held-out rows, the first ones."
    )
    slice: Slice | None = Field(
        default=None,
        title="Slice",
        description="Keep only these of the training prompts, with all rows of each, in the stream's order; all when unset.",
    )


SPEC = StageSpec(
    name="prepare",
    version=2,
    config=PrepareConfig,
    inputs={
        "source": Port("dataset"),
        "also": Port("dataset", required=False),
        "exclude": Port("dataset", required=False),
    },
    outputs={"train": "dataset", "heldout": "dataset"},
    headline=("rows_train", "rows_heldout"),
)
