"""Sampling and measuring a step's completions, on one process or many: each does its share, and all end with all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stages.data.batching import TokenBatch
from stages.data.chat import encode_prompt
from stages.errors import InputError
from stages.models.load import LoadedModel, LoadedPolicy
from stages.models.reward import RewardModel, SequenceScores, raw_scores
from stages.rollouts.batch import Rollouts
from stages.rollouts.sample import Ended, Row, sample_rows
from stages.run import Run
from stages.specs.base import Runtime
from stages.specs.common import Sampling

Measure = Callable[[TokenBatch], Sequence[torch.Tensor]]


def usable_prompts(run: Run, prompts: Path, policy: LoadedModel, others: Sequence[LoadedModel], new_tokens: int) -> list[Row]:
    """The prompts' rows, but for those that fill the policy's context, or whose longest completion that of another model.

    Raises InputError when none is left.
    """
    rows, dropped, limit = [], 0, min((other.context for other in others), default=2**31)
    for row in run.rows(prompts):
        length = len(encode_prompt(policy.tokenizer, row["prompt"]))
        if 0 < length < policy.context and min(policy.context, length + new_tokens) <= limit:
            rows.append(row)
        else:
            dropped += 1
    if not rows:
        raise InputError(f"all {dropped} prompts fill the context; shorten them, or lower sampling.max_new_tokens")
    run.table("prompts", [{"what": "used", "rows": len(rows)}, {"what": "dropped: fills the context", "rows": dropped}])
    return rows


def collect(
    accelerator: Accelerator,
    policy: LoadedPolicy,
    rows: Sequence[Row],
    sampling: Sampling,
    seed: int,
    step: int,
    runtime: Runtime,
    *,
    samples: int = 1,
    seen: Counter[str] | None = None,
    ended: Ended = lambda *_: None,
) -> Rollouts:
    """`samples` completions of each row, in order. A row that comes twice is sampled anew: `seen` counts, by row, what this
    step has drawn already. `ended` is told of each that this process draws as soon as it has ended, with its place."""
    seen = Counter() if seen is None else seen
    numbers = []
    for row in rows:
        numbers.append(seen[row["id"]])
        seen[row["id"]] += samples
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    places = [place * samples + number for place in mine for number in range(samples)]
    with accelerator.autocast():
        drawn, _ = sample_rows(
            policy,
            [rows[place] for place in mine],
            sampling,
            seed=seed,
            step=step,
            samples=samples,
            numbers=[numbers[place] for place in mine],
            batch_size=runtime.generation_batch,
            ended=lambda number, sample: ended(places[number], sample),
        )
    found: list[Any] = gather_object(list(zip(places, drawn, strict=True)))
    return Rollouts([sample for _, sample in sorted(found, key=lambda pair: pair[0])])


def score(accelerator: Accelerator, reward: RewardModel, rollouts: Rollouts, runtime: Runtime) -> np.ndarray:
    """scores_B, float64: the reward model's reward of each completion, of exactly the tokens that were sampled."""
    mine = list(range(accelerator.process_index, len(rollouts), accelerator.num_processes))
    raw_B = np.zeros(len(rollouts))
    with accelerator.autocast():
        raw_B[mine] = raw_scores(
            SequenceScores(reward.model), reward, [rollouts.ids(place) for place in mine], runtime.micro_batch_tokens
        )
    return reward.rewards(_sum(accelerator, torch.from_numpy(raw_B)).numpy())


@torch.no_grad()
def measure(
    accelerator: Accelerator, rollouts: Rollouts, names: Sequence[str], function: Measure, batches: Sequence[TokenBatch]
) -> None:
    """Keep, under `names`, the numbers that `function` gives for each token. `batches` are this process's share."""
    found = torch.zeros((len(names), int(rollouts.lengths_B.sum())))
    with accelerator.autocast():
        for batch in batches:
            batch = batch.to(accelerator.device)
            for values_N, values_BT in zip(found, function(batch), strict=True):
                rollouts.take(values_N, batch, values_BT)
    for name, values_N in zip(names, _sum(accelerator, found), strict=True):
        rollouts.tokens[name] = values_N


def _sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, where each has zeros in place of the others' share."""
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()  # pyright: ignore[reportAttributeAccessIssue]
