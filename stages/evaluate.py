"""Evaluation: sample held-out prompts from a policy and measure it under verifiers, rewards, a judge and a reference.

    accuracy    share of completions that the verifier calls correct (= pass@1); pass_at_k over all samples of a prompt
    rewards.*   mean of further rewards
    win_rate    share of prompts on which the judge scores the policy above the opponent; a tie counts one half
    kl          mean over completions of sum_t log pi(y_t) - log pi_ref(y_t), in nats a completion (k1, rl4llm 6.4)

Every mean is over prompts, with a 95% bootstrap interval (percentiles over resampled prompts) in `_low` and `_high`.
A reward of None is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stages.data.batching import pad, split_by_length
from stages.data.parquet import read_schema, write_rows
from stages.errors import InputError
from stages.models.load import LoadedPolicy, load_policy
from stages.models.logprobs import TokenLogProbs
from stages.rewards import Score, require_columns, score
from stages.rollouts.sample import Sample, sample_rows
from stages.run import Run
from stages.specs.common import RewardRef
from stages.specs.evaluate import EvaluateConfig
from stages.statistics import summary
from stages.training.setup import accelerator_for, count_parameters, set_threads

Values = list[float | None]


def evaluate(
    config: EvaluateConfig,
    run: Run,
    *,
    policy: Path,
    prompts: Path,
    reference: Path | None = None,
    opponent: Path | None = None,
) -> None:
    """Measure `policy` on `prompts`; write every generation with its rewards. Raises InputError before sampling when a
    reward lacks its column. Without an opponent the judge is not asked."""
    wanted = [
        *([config.verifier] if config.verifier else []),
        *config.rewards,
        *([config.judge] if config.judge and opponent else []),
    ]
    for reward in wanted:
        require_columns(reward.name, read_schema(prompts).names, "the prompts")
    rows = list(islice(run.rows(prompts), config.prompts))

    model = _load(config, policy)
    samples, dropped = _sample(config, run, model, rows, "policy")
    if not samples:
        raise InputError("every prompt fills the model's context: nothing was sampled")
    values: dict[str, Values] = {f"rewards.{ref.name}": _totals(ref, samples) for ref in config.rewards}
    if config.verifier:
        values["accuracy"] = _totals(config.verifier, samples)
    if reference is not None:
        other = _load(config, reference)
        if other.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise InputError("the policy and the reference have different tokenizers, so there is no KL between them")
        ours, theirs = (_log_likelihoods(config, samples, one) for one in (model, other))
        values["kl"] = [a - b for a, b in zip(ours, theirs, strict=True)]
    if opponent is not None and config.judge is not None:
        rivals, _ = _sample(config, run, _load(config, opponent), rows, "opponent")
        values["win_rate"] = wins(config.judge, samples, rivals)
    values["length"] = [float(len(sample.completion.ids)) for sample in samples]

    metrics: dict[str, float] = {}
    for name, numbers in values.items():
        metrics |= summary(name, by_prompt(samples, numbers), config.bootstrap, config.seed)
        if missing := sum(number is None for number in numbers):
            metrics[f"{name}_missing"] = float(missing)
    if config.verifier and config.samples > 1:
        solved = [max(group) for group in by_prompt(samples, values["accuracy"])]
        metrics |= summary(f"pass_at_{config.samples}", [[value] for value in solved], config.bootstrap, config.seed)
    truncated = sum(sample.completion.finish == "length" for sample in samples)
    run.log(0, metrics | {"truncated": truncated / len(samples), "prompts_dropped": float(dropped)})

    records: list[dict[str, Any]] = [
        sample.record(0, "policy") | {name: of[i] for name, of in values.items() if name != "length"}
        for i, sample in enumerate(samples)
    ]
    write_rows(run.output("generations"), records, types={name: pa.float64() for name in values if name != "length"})
    run.table("generations", [{"prompt": str(r["prompt"])[-60:], "completion": r["completion"][:120]} for r in records[:4]])


def by_prompt(samples: Sequence[Sample], numbers: Values) -> list[list[float]]:
    """Numbers grouped by the prompt's row; None is left out, and a prompt with nothing but None too."""
    groups: dict[str, list[float]] = {}
    for sample, number in zip(samples, numbers, strict=True):
        if number is not None:
            groups.setdefault(sample.row["id"], []).append(number)
    return list(groups.values())


def wins(judge: RewardRef, ours: Sequence[Sample], theirs: Sequence[Sample]) -> Values:
    """1, 0.5 or 0 for each of our samples against theirs of the same prompt and number; None where a score is missing."""
    rivals = {(sample.row["id"], sample.sample): total for sample, total in zip(theirs, _totals(judge, theirs), strict=True)}
    result: Values = []
    for sample, mine in zip(ours, _totals(judge, ours), strict=True):
        rival = rivals.get((sample.row["id"], sample.sample))
        result.append(None if mine is None or rival is None else 1.0 if mine > rival else 0.0 if mine < rival else 0.5)
    return result


def _load(config: EvaluateConfig, folder: Path) -> LoadedPolicy:
    policy = load_policy(folder, config.dtype)
    set_threads(config.runtime, count_parameters(policy.model))
    policy.model.to(accelerator_for(config.runtime).device).eval()  # pyright: ignore[reportArgumentType]
    return policy


def _sample(
    config: EvaluateConfig, run: Run, policy: LoadedPolicy, rows: list[dict[str, Any]], who: str
) -> tuple[list[Sample], int]:
    total = len(rows) * config.samples
    return sample_rows(
        policy,
        rows,
        config.sampling,
        seed=config.seed,
        samples=config.samples,
        batch_size=config.runtime.generation_batch,
        progress=lambda done: run.progress(done, total, f"sampling the {who}"),
    )


def _totals(ref: RewardRef, samples: Sequence[Sample]) -> Values:
    scores: list[Score | None] = score(ref.name, [s.text for s in samples], [s.row for s in samples], **ref.args)
    totals = [None if one is None else one.total for one in scores]
    return [None if total is None or math.isnan(total) else total for total in totals]


@torch.no_grad()
def _log_likelihoods(config: EvaluateConfig, samples: Sequence[Sample], policy: LoadedPolicy) -> list[float]:
    """log pi(completion | prompt) of each sample by the training forward, at temperature 1."""
    module = TokenLogProbs(policy.model)
    sequences = [np.array([*sample.prompt_ids, *sample.completion.ids]) for sample in samples]
    result = [0.0] * len(samples)
    for group in split_by_length([len(ids) for ids in sequences], config.runtime.micro_batch_tokens):
        batch = pad([sequences[i] for i in group], [len(samples[i].prompt_ids) for i in group], policy.pad_id, tuple(group))
        sums_B = module(batch.to(policy.model.device)).sum(-1)  # pyright: ignore[reportArgumentType]
        for i, value in zip(group, sums_B.tolist(), strict=True):
            result[i] = value
    return result
