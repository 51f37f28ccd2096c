"""Rewards of a step's completions, on one process or many, and which token each rated step ends at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from stages.data.steps import last_tokens
from stages.rewards.base import Score
from stages.rewards.mix import Begun, Mixed
from stages.rollouts.batch import Rollouts
from stages.rollouts.sample import Ended
from stages.specs.grpo import Truncation


def verify_as_ended(begun: Begun) -> Ended:
    """Hands each completion to the verifiers as soon as it has ended."""
    return lambda place, sample: begun.add(place, sample.text, sample.rated_row)


def give_rewards(accelerator: Accelerator, begun: Begun, rollouts: Rollouts) -> list[Mixed]:
    """Score every completion; keep `reward` and `rewards.*` (NaN: none) in `rollouts.each`, the rated steps (none without
    a reward), and what they note.

    The pooled parts have `begun` with the completions that this process drew; of the others each process does its share.
    """
    mixture = begun.mixture
    mine = range(accelerator.process_index, len(rollouts), accelerator.num_processes)
    samples = [rollouts.samples[place] for place in mine]
    with accelerator.autocast():
        here = mixture.unpooled([sample.text for sample in samples], [sample.rated_row for sample in samples])
    scores: list[dict[str, Score | None]] = [{} for _ in range(len(rollouts))]
    for share in (list(zip(mine, here, strict=True)), list(begun.pooled().items())):
        found: list[Any] = gather_object(share)
        for place, ones in found:
            scores[place] |= ones
    verdicts = [mixture.mixed(sample.text, ones) for sample, ones in zip(rollouts.samples, scores, strict=True)]
    rollouts.each["reward"] = _numbers([one.total for one in verdicts])
    for key in mixture.keys:
        rollouts.each[f"rewards.{key}"] = _numbers([one.parts.get(key) for one in verdicts])
    rollouts.steps = [[] if one.total is None else list(one.steps) for one in verdicts]
    rollouts.notes = [dict(one.notes) for one in verdicts]
    return verdicts


def punish_length(rollouts: Rollouts, truncation: Truncation, limit: int) -> None:
    """Take the penalty of length off the rewards: all of it for what was cut off at `limit` tokens, and before that evenly more
    over the window (DAPO's soft overlong punishment, arXiv 2503.14476 eq. 13)."""
    over_B = torch.from_numpy(rollouts.lengths_B - (limit - truncation.window)).double()
    rising_B = (over_B / truncation.window).clamp(0, 1) if truncation.window else torch.zeros_like(over_B)
    penalty_B = -truncation.penalty * torch.where(torch.from_numpy(rollouts.truncated_B), 1.0, rising_B)
    rollouts.each |= {"reward": rollouts.each["reward"] + penalty_B, "rewards.overlong": penalty_B}


def rated_steps(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> tuple[list[list[float]], list[list[int]]]:
    """The scores of each completion's steps, and the place among its tokens where each ends."""
    ends = [
        last_tokens(tokenizer, sample.completion.ids, sample.text, [end for end, _ in of])
        for sample, of in zip(rollouts.samples, rollouts.steps, strict=True)
    ]
    return [[score for _, score in of] for of in rollouts.steps], ends


def _numbers(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
