"""Reward model: a scalar score of a completion, learnt from comparisons (rl4llm 4.1.3, eq. 13; InstructGPT, arXiv 2203.02155).

    for each step:
        take batch_size rows of a seeded permutation; score each of their completions once
        L = mean over rows of the mean over the row's ordered pairs of  -log sigmoid(r(better) - r(worse) - margin)
        AdamW step
    after each epoch: the held-out loss and pair accuracy
    at the end: r <- (r - mean r on demonstrations) / (deviation of r on the SFT policy's samples)   (4.1.5)

A pair is a ranking of two. All pairs of one prompt are one batch element (InstructGPT): taken apart, each completion would
get as many updates as it has pairs, and overfit.

Departures: none from the papers. The score is read at the last token, which is the EOS unless the completion was truncated.

Shapes: B sequences; a row has K of them, K = 2 for pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from stages.data.batching import RowOrder, TokenBatch, pad
from stages.data.parquet import write_rows
from stages.data.preferences import PreferenceTable, encode_preferences, preference_batches
from stages.errors import InputError
from stages.models.reward import (
    RewardModel,
    SequenceScores,
    check_scores,
    new_reward_model,
    raw_scores,
    save_reward_model,
    score_rows,
)
from stages.objectives.reward import bradley_terry, ranking
from stages.run import Run
from stages.specs.reward_model import RewardModelConfig
from stages.statistics import by_quantile, calibration, summary
from stages.training import state
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import optimization_step


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
    rows' `scores`. The rewards are shifted on `demonstrations` and scaled on `samples` when these are given."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    reward = new_reward_model(model, config.seed)
    set_threads(config.runtime, count_parameters(reward.model))
    table = _tokenise(config, run, accelerator, reward, train, "train")
    held = _tokenise(config, run, accelerator, reward, heldout, "heldout")
    _check_options(config, table)

    size = config.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * len(table) / size))
    steps_an_epoch = max(1, math.ceil(len(table) / size))
    order = RowOrder(len(table), config.seed)
    check_scores(reward, config.runtime.packed)
    module = SequenceScores(reward.model).train()
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], steps)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}

    resumed = state.load(run, accelerator)
    start = resumed["step"] if resumed else 0
    if start == 0:
        before = heldout_metrics(config, held, _scores(config, accelerator, reward, module, held))
        run.log(0, {f"{name}_before": before[name] for name in ("heldout_loss", "pair_accuracy") if name in before})
    clock = perf_counter()
    for step in range(start, steps):
        rows = order.take(step * size, size)
        lr = scheduler.get_last_lr()[0]
        metrics = optimization_step(
            accelerator,
            module,
            optimizer,
            scheduler,
            _micro_batches(config, accelerator, reward, table, rows),
            lambda batch: preference_loss(config, table, module(batch), batch.indices, size),
            clip,
            lambda step=step, rows=rows: f"step {step + 1}, rows {sorted((table.rows_G[rows] + 1).tolist())} of train",
        )
        done = step + 1
        if done % config.runtime.log_every == 0 or done == steps:
            rate = (done - start) * size / (perf_counter() - clock)
            run.log(done, metrics | {"lr": lr, "rows_per_second": rate})
            run.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if done % steps_an_epoch == 0 and done < steps:
            run.log(done, heldout_metrics(config, held, _scores(config, accelerator, reward, module, held)))
        if done % config.runtime.save_every == 0 or done == steps:
            state.save(run, accelerator, done, {})

    raw_N = _scores(config, accelerator, reward, module, held)
    run.log(steps, heldout_metrics(config, held, raw_N))
    if accelerator.is_main_process:
        with accelerator.autocast():
            run.log(steps, _calibrate(config, run, reward, demonstrations, samples))
        save_reward_model(reward, run.output("checkpoint"))
        _write_scores(run, heldout, held, reward, raw_N)
        _tables(run, held, raw_N)
    accelerator.wait_for_everyone()


def preference_loss(
    config: RewardModelConfig, table: PreferenceTable, scores_B: torch.Tensor, indices: Sequence[int], total: int
) -> torch.Tensor:
    """Sum over the rows of a micro-batch of each row's loss, divided by `total`, the rows of the whole step.

    Without indices (a rank that is left without rows): 0, with a gradient of zeros.
    """
    if not indices:
        return 0.0 * scores_B.sum()
    groups_B = table.groups_N[list(indices)]
    if table.paired:
        chosen_B, rejected_B = scores_B[0::2], scores_B[1::2]
        margin_B = None
        if config.margin_weight:
            margin_B = torch.from_numpy(config.margin_weight * table.margins_G[groups_B[0::2]]).to(scores_B.device)
        losses_B = bradley_terry(chosen_B, rejected_B, margin_B) + config.center_weight * (chosen_B + rejected_B) ** 2
        return losses_B.sum() / total
    ranks_B = torch.from_numpy(table.ranks_N[list(indices)]).to(scores_B.device)
    sizes: list[int] = torch.unique_consecutive(torch.from_numpy(groups_B), return_counts=True)[1].tolist()
    losses = [ranking(scores_K, ranks_K) for scores_K, ranks_K in zip(scores_B.split(sizes), ranks_B.split(sizes), strict=True)]
    return torch.stack(losses).sum() / total


def heldout_metrics(config: RewardModelConfig, held: PreferenceTable, raw_N: np.ndarray) -> dict[str, float]:
    """Loss (eq. 13, without margins) and pair accuracy, means over rows, the latter with its interval.

    A pair with equal scores is neither right nor wrong: it is left out of the accuracy; `pair_ties` is their share of pairs.
    """
    pairs = held.differences(raw_N)
    loss = np.mean([np.logaddexp(0.0, -one).mean() for one in pairs])
    decided = [[float(difference > 0) for difference in one if difference != 0] for one in pairs]
    differences = np.concatenate(pairs)
    accuracy = summary("pair_accuracy", [one for one in decided if one], config.bootstrap, config.seed)
    error, _ = calibration(*_choices(differences))
    ties = float((differences == 0).mean())
    return accuracy | {"heldout_loss": float(loss), "pair_ties": ties, "calibration_error": error}


def _choices(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure the model is of each pair that it decides, and whether it is right."""
    decided = differences[differences != 0]
    return 1 / (1 + np.exp(-np.abs(decided))), decided > 0


def _tables(run: Run, held: PreferenceTable, raw_N: np.ndarray) -> None:
    """Calibration, and accuracy by how much better the chosen is where the rows say it."""
    run.table("calibration", calibration(*_choices(np.concatenate(held.differences(raw_N))))[1])
    if held.paired and not np.isnan(held.margins_G).any():
        differences = np.concatenate(held.differences(raw_N))
        decided = differences != 0
        run.table("accuracy by margin", by_quantile(held.margins_G[decided], differences[decided] > 0))


def _tokenise(
    config: RewardModelConfig, run: Run, accelerator: Accelerator, reward: RewardModel, data: Path, name: str
) -> PreferenceTable:
    path = run.work / name
    if accelerator.is_main_process and not path.with_suffix(".json").is_file():
        limit = min(config.max_length, reward.context)
        counts = encode_preferences(path, run.rows(data), reward.tokenizer, reward.stops, limit)
        run.table(f"{name} rows", [{"what": what, "rows": count} for what, count in counts.items()])
    accelerator.wait_for_everyone()
    return PreferenceTable(path)


def _check_options(config: RewardModelConfig, table: PreferenceTable) -> None:
    if (config.margin_weight or config.center_weight) and not table.paired:
        raise InputError("margin_weight and center_weight are for pairs; these rows are rankings: set both to 0")
    if config.margin_weight and np.isnan(table.margins_G).any():
        row = int(table.rows_G[np.isnan(table.margins_G)][0])
        raise InputError(f'margin_weight is set, but row {row + 1} of train has no "margin"')


def _micro_batches(
    config: RewardModelConfig, accelerator: Accelerator, reward: RewardModel, table: PreferenceTable, rows: np.ndarray
) -> list[TokenBatch]:
    mine, runtime = rows[accelerator.process_index :: accelerator.num_processes], config.runtime
    batches = list(preference_batches(table, mine, runtime.micro_batch_tokens, runtime.packed, reward.pad_id))
    # A rank that is left without rows still takes part in the step, with a sequence that counts for nothing.
    return batches or [pad([table.tokens.ids(0)], [1], reward.pad_id, ())]


def _scores(
    config: RewardModelConfig, accelerator: Accelerator, reward: RewardModel, module: torch.nn.Module, held: PreferenceTable
) -> np.ndarray:
    """raw_N: the raw score of every held-out completion, each rank scoring its share."""
    places = list(range(accelerator.process_index, len(held.tokens), accelerator.num_processes))
    raw_N = np.zeros(len(held.tokens))
    # A rank without a share scores one all the same: DDP's ranks must enter their first forward together.
    sequences = [held.tokens.ids(i) for i in places or [0]]
    raw_N[places] = raw_scores(module, reward, sequences, config.runtime.micro_batch_tokens)[: len(places)]
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


def _write_scores(run: Run, heldout: Path, held: PreferenceTable, reward: RewardModel, raw_N: np.ndarray) -> None:
    """The held-out rows that were used, each completion with its reward."""
    rewards_N = reward.rewards(raw_N)
    group_of = {int(row): group for group, row in enumerate(held.rows_G)}

    def records() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(run.rows(heldout)):
            if number not in group_of:
                continue
            members = held.members(group_of[number])
            found = {int(place): float(one) for place, one in zip(held.places_N[members], rewards_N[members], strict=True)}
            if "chosen" in row and "rejected" in row:
                yield row | {"chosen_reward": found[0], "rejected_reward": found[1]}
            else:
                yield row | {"rewards": [found.get(place) for place in range(len(row["completions"]))]}

    write_rows(run.output("scores"), records())
