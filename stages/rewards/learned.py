"""A learned reward model as a part of a mixed reward: of the whole completion, or of its final answer alone (rl4llm 6.7.4).
That of its steps is in `process`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from stages.errors import InputError
from stages.models.reward import RewardModel, SequenceScores, check_scores, load_reward_model, score_rows
from stages.rewards.base import Row, Score
from stages.rewards.text import as_shown
from stages.specs.common import RewardRef

PROCESS = "process_model"


def learned(
    completions: Sequence[str],
    rows: Sequence[Row],
    *,
    model: RewardModel,
    part: Literal["completion", "answer"] = "completion",
    max_tokens: int = 16384,
) -> list[Score | None]:
    """The model's reward of each completion; None for what does not fit in its context.

    `answer` shows it what a reader is shown: the text after the thinking, without tags. A completion that was cut off has no
    EOS, unless its answer was complete.
    """
    shown = [
        as_shown(text, row.get("finish")) if part == "answer" else (text, row.get("finish"))
        for text, row in zip(completions, rows, strict=True)
    ]
    texts = [{"prompt": row["prompt"], "completion": text, "finish": end} for (text, end), row in zip(shown, rows, strict=True)]
    raw_B = score_rows(SequenceScores(model.model), model, texts, model.context, max_tokens)
    return [Score(float(one)) if np.isfinite(one) else None for one in model.rewards(raw_B)]


def load_judges(parts: Sequence[RewardRef], folders: Mapping[str, Path | None], device: torch.device) -> dict[str, RewardModel]:
    """The reward models that rewards are for, by name. Raises InputError for a reward without its model, for a model without a
    reward, and for one that rates steps where whole completions are to be rated, or the other way round."""
    models: dict[str, RewardModel] = {}
    for name, folder in folders.items():
        wanted = any(part.name == name for part in parts)
        if wanted and folder is None:
            raise InputError(f"the reward {name!r} reads a model, which is to be given as the input {name!r}")
        if folder is None:
            continue
        if not wanted:
            raise InputError(f"there is an input {name!r}, but no reward of this name; add {{name: {name}}} to rewards")
        models[name] = load_reward_model(folder, rates="steps" if name == PROCESS else "completions")
        if models[name].step_separator == "" and any(part.name == PROCESS and not part.args.get("steps") for part in parts):
            raise InputError(
                f"the reward {PROCESS!r} needs `steps` in its args, a regular expression whose match ends a step: its model "
                'was trained on steps with nothing between them (step_separator: "")'
            )
        check_scores(models[name], packed=False)
        models[name].model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    return models


def model_arguments(models: Mapping[str, RewardModel], max_tokens: int) -> dict[str, dict[str, object]]:
    """What a `Mixture` is given for the learned rewards, by name."""
    return {name: {"model": model, "max_tokens": max_tokens} for name, model in models.items()}
