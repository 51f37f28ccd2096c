"""A process reward model as a reward: it rates each step of a completion (Lightman et al., arXiv 2305.20050; rl4llm 6.3).

A step's score is the probability that it is right; the completion's is reduced from them: their minimum (Math-Shepherd, arXiv
2312.08935, and Lightman et al., who also take the product: that all of them are right), mean or last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.data.chat import encode
from stages.data.steps import last_tokens_of_encoded, step_ends
from stages.models.reward import RewardModel, SequenceScores, raw_step_scores
from stages.rewards.base import Row, Score
from stages.specs.common import ProcessArgs, Reduce

REDUCE: dict[Reduce, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "product": np.prod,
    "mean": np.mean,
    "last": lambda scores: scores[-1],
}


def process(
    completions: Sequence[str],
    rows: Sequence[Row],
    *,
    model: RewardModel,
    max_tokens: int = 16384,
    **args: Any,
) -> list[Score | None]:
    """Each completion's steps, rated, with their ends; None for what does not fit in the model's context. A text that the
    model's tokenizer cannot spell is one step. A completion that was cut off has no EOS, and its last step is rated too.
    `args`: see `ProcessArgs`."""
    given = ProcessArgs.model_validate(args)
    pattern = separators(model) if given.steps is None else given.steps
    ends, asked, sequences = {}, [], {}
    for place, (text, row) in enumerate(zip(completions, rows, strict=True)):
        encoded, stopped = encode(model.tokenizer, row["prompt"], text, model.stops), row.get("finish") != "length"
        ids = encoded.completion_ids if stopped else encoded.completion_ids[:-1]
        if not 0 < len(ids) <= model.context - len(encoded.prompt_ids):
            continue
        found = step_ends(text, pattern)
        tokens = last_tokens_of_encoded(model.tokenizer, ids, stopped, text, found)
        if tokens is None:
            found, tokens = [max(0, len(text) - 1)], [len(ids) - 1]
        ends[place], sequences[place] = found, np.array([*encoded.prompt_ids, *ids])
        asked.append(len(encoded.prompt_ids) + np.array(tokens))
    raw = raw_step_scores(SequenceScores(model.model), model, list(sequences.values()), asked, max_tokens)
    scores = {place: model.step_scores(one) for place, one in zip(sequences, raw, strict=True)}
    return [_score(scores[place], ends[place], given.reduce) if place in scores else None for place in range(len(completions))]


def separators(model: RewardModel) -> str:
    """A pattern of what stood between the steps that a model was trained on, once or more often."""
    return f"(?:{re.escape(model.step_separator or '')})+"


def _score(scores: np.ndarray, ends: list[int], reduce: Reduce) -> Score | None:
    if not np.isfinite(scores).all():
        return None
    return Score(float(REDUCE[reduce](scores)), step_scores=scores.tolist(), step_ends=ends)
