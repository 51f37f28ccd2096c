"""Reward model: a scalar score of a completion, learnt from comparisons (rl4llm 4.1.3, eq. 13; InstructGPT, arXiv 2203.02155),
or of each of its steps, learnt from labels of these (Lightman et al., arXiv 2305.20050).

    for each step:
        take batch_size rows of a seeded permutation; score each of their completions once
        comparisons: L = mean over rows of the mean over the row's ordered pairs of  -log sigmoid(r(better) - r(worse) - margin)
        step labels: L = mean over the rows' steps of the cross-entropy of sigmoid(r(step)) with the step's label
        AdamW step
    after each epoch: the held-out loss and accuracy
    at the end, of comparisons: r <- (r - mean r on demonstrations) / (deviation of r on the SFT policy's samples)   (4.1.5)

A pair is a ranking of two. All pairs of one prompt are one batch element (InstructGPT): taken apart, each completion would
get as many updates as it has pairs, and overfit.

Departures: none from the papers. The score of a completion is read at its last token, which is the EOS unless it was truncated;
that of a step after its last token, as Lightman et al. do, by the same scalar head.

Shapes: B sequences; a row of comparisons has K of them, K = 2 for pairs, one of step labels has one; N scores of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from stages.data.batching import RowOrder, TokenBatch, pad
from stages.data.parquet import read_schema, write_rows
from stages.errors import InputError
from stages.models.reward import (
    RewardModel,
    SequenceScores,
    check_scores,
    new_reward_model,
    raw_step_scores,
    save_reward_model,
    score_rows,
)
from stages.run import Run
from stages.specs.reward_model import RewardModelConfig
from stages.training import state
from stages.training.comparisons import Comparisons
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import optimization_step
from stages.training.step_labels import StepLabels

# What both kinds of rows offer, each in its own way.
Examples = Comparisons | StepLabels
Form = type[Comparisons] | type[StepLabels]


def reward_model(
    config: RewardModelConfig,
    run: Run,
    *,
    model: Path,
    train: Path,
    heldout: Path,
    demonstrations: Path | None = None,
    samples: Path | None = None,
) -> None:
    """Train on `train` from `model` (a policy, a base, or an earlier reward model); write `checkpoint` and the held-out
    rows' `scores`. Rows with "labels" make a process model. Other rewards are shifted on `demonstrations` and scaled on
    `samples` when these are given."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    reward = new_reward_model(model, config.seed)
    set_threads(config.runtime, count_parameters(reward.model))
    learn: Form = StepLabels if {"completions", "labels"} <= set(read_schema(train).names) else Comparisons
    data = _tokenise(config, run, accelerator, reward, train, "train", learn)
    held = _tokenise(config, run, accelerator, reward, heldout, "heldout", learn)
    data.check_options()

    size, rows = config.batch_size, len(data.rows)
    steps = config.steps or max(1, math.ceil(config.epochs * rows / size))
    steps_an_epoch = max(1, math.ceil(rows / size))
    order = RowOrder(rows, config.seed)
    check_scores(reward, config.runtime.packed)
    module = SequenceScores(reward.model).train()
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], steps)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}

    resumed = state.load(run, accelerator)
    start = resumed["step"] if resumed else 0
    if start == 0:
        before = held.metrics(_measured(config, accelerator, reward, module, held))
        run.log(0, {f"{name}_before": before[name] for name in ("heldout_loss", held.accuracy) if name in before})
    clock = perf_counter()
    for step in range(start, steps):
        items = order.take(step * size, size)
        total = data.count(items)
        lr = scheduler.get_last_lr()[0]
        metrics = optimization_step(
            accelerator,
            module,
            optimizer,
            scheduler,
            _micro_batches(accelerator, reward, data, items),
            lambda batch, total=total: data.loss(module, batch, total),
            clip,
            lambda step=step, items=items: f"step {step + 1}, rows {sorted((data.rows[items] + 1).tolist())} of train",
        )
        done = step + 1
        if done % config.runtime.log_every == 0 or done == steps:
            rate = (done - start) * size / (perf_counter() - clock)
            run.log(done, metrics | {"lr": lr, "rows_per_second": rate})
            run.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if done % steps_an_epoch == 0 and done < steps:
            run.log(done, held.metrics(_measured(config, accelerator, reward, module, held)))
        if done % config.runtime.save_every == 0 or done == steps:
            state.save(run, accelerator, done, {})

    raw_N = _measured(config, accelerator, reward, module, held)
    run.log(steps, held.metrics(raw_N))
    if accelerator.is_main_process:
        if isinstance(data, StepLabels):
            reward.rate_steps(config.step_separator)
            if demonstrations is not None or samples is not None:
                run.message(
                    "demonstrations and samples are not used: a process model gives probabilities, not rewards to scale"
                )
        else:
            with accelerator.autocast():
                run.log(steps, _calibrate(config, run, reward, demonstrations, samples))
        save_reward_model(reward, run.output("checkpoint"))
        write_rows(run.output("scores"), _scored(run, heldout, held, reward, raw_N))
        held.report(run, raw_N)
    accelerator.wait_for_everyone()


def _tokenise(
    config: RewardModelConfig, run: Run, accelerator: Accelerator, reward: RewardModel, data: Path, name: str, learn: Form
) -> Examples:
    path = run.work / name
    if accelerator.is_main_process and not path.with_suffix(".json").is_file():
        counts = learn.encode(config, path, run.rows(data), reward, min(config.max_length, reward.context))
        run.table(f"{name} rows", [{"what": what, "rows": count} for what, count in counts.items()])
    accelerator.wait_for_everyone()
    return learn(config, path)


def _micro_batches(accelerator: Accelerator, reward: RewardModel, data: Examples, items: np.ndarray) -> list[TokenBatch]:
    batches = list(data.batches(items[accelerator.process_index :: accelerator.num_processes], reward.pad_id))
    # A rank that is left without rows still takes part in the step, with a sequence that counts for nothing.
    return batches or [pad([data.tokens.ids(0)], [1], reward.pad_id, ())]


def _measured(
    config: RewardModelConfig, accelerator: Accelerator, reward: RewardModel, module: torch.nn.Module, held: Examples
) -> np.ndarray:
    """raw_N: all raw scores of the held-out rows, each rank giving its share."""
    mine = list(range(accelerator.process_index, len(held.tokens), accelerator.num_processes))
    # A rank without a share scores one all the same: DDP's ranks must enter their first forward together.
    asked = mine or [0]
    sequences, limit = [held.tokens.ids(one) for one in asked], config.runtime.micro_batch_tokens
    found = raw_step_scores(module, reward, sequences, held.ends(asked), limit)
    raw_N = np.zeros(len(held.places(range(len(held.tokens)))))
    if mine:
        raw_N[held.places(mine)] = np.concatenate(found)
    gathered = accelerator.reduce(torch.from_numpy(raw_N).to(accelerator.device), reduction="sum")
    return gathered.cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]


def _calibrate(
    config: RewardModelConfig, run: Run, reward: RewardModel, demonstrations: Path | None, samples: Path | None
) -> dict[str, float]:
    """Set the offset and the scale of the checkpoint (4.1.5): raw scores mean something only up to both."""
    bias, scale = 0.0, 1.0
    if demonstrations is not None:
        bias = -float(_score_rows(config, run, reward, demonstrations, config.shift_rows).mean())
    if samples is not None:
        raw_B = _score_rows(config, run, reward, samples, config.scale_rows)
        spread = float(raw_B.std())
        # Equal scores differ by rounding alone, which must not be blown up to unit spread.
        if spread > 1e-5 * max(1.0, float(np.abs(raw_B).max())):
            scale = 1 / spread
        else:
            run.message("the samples all have one score: the rewards are not scaled")
    reward.calibrate(bias, scale)
    return {"reward_bias": bias, "reward_scale": scale}


def _score_rows(config: RewardModelConfig, run: Run, reward: RewardModel, data: Path, count: int) -> np.ndarray:
    """Raw scores of a dataset's first completions, those left out that do not fit."""
    rows = list(islice(run.rows(data), count))
    if "completion" not in rows[0]:
        raise InputError(f'{data.name}: its rows have no column "completion" (they have {", ".join(rows[0])})')
    limit = min(config.max_length, reward.context)
    raw_B = score_rows(SequenceScores(reward.model), reward, rows, limit, config.runtime.micro_batch_tokens)
    if np.isnan(raw_B).all():
        raise InputError(f"{data.name}: no completion fits in {limit} tokens, so the rewards cannot be set by them")
    return raw_B[~np.isnan(raw_B)]


def _scored(run: Run, heldout: Path, held: Examples, reward: RewardModel, raw_N: np.ndarray) -> Iterator[dict[str, Any]]:
    """The held-out rows that were used, with their scores."""
    item_of = {int(row): item for item, row in enumerate(held.rows)}
    for number, row in enumerate(run.rows(heldout)):
        if number in item_of:
            yield held.scored(item_of[number], row, reward, raw_N)
