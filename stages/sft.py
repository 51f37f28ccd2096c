"""Supervised fine-tuning: maximise the likelihood of demonstrations (rl4llm 3.1.1, eq. 3; 4.1.2).

    for each step:
        take batch_size rows of a seeded permutation
        L = - sum_t log pi(x_t | x_<t) / (number of tokens that carry loss in the whole batch)
        AdamW step
    after each epoch: the held-out loss

With the loss on all tokens this is language modelling: it also trains a base model from random weights.

Departures: none from the paper. InstructGPT found that epochs past the lowest held-out loss still help what follows, so no
early stopping is built in; the held-out loss after each epoch is logged.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from stages.data.batching import RowOrder, TokenBatch, micro_batches, pad, target_count
from stages.data.encode import encode_demonstrations
from stages.data.parquet import write_rows
from stages.data.tokens import TokenTable
from stages.models.load import LoadedPolicy, load_policy, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.likelihood import nll_loss
from stages.rollouts.sample import sample_rows
from stages.run import Run
from stages.specs.sft import SftConfig
from stages.training import state
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import optimization_step


def sft(config: SftConfig, run: Run, *, model: Path, train: Path, heldout: Path | None = None) -> None:
    """Fine-tune `model` on `train`; write `checkpoint` and `generations` on held-out prompts (on training ones without any)."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    policy = load_policy(model, seed=config.seed)
    set_threads(config.runtime, count_parameters(policy.model))
    table = _tokenise(config, run, accelerator, policy, train, "train")
    held = _tokenise(config, run, accelerator, policy, heldout, "heldout") if heldout and config.heldout_rows else None

    size = config.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * len(table) / size))
    steps_an_epoch = max(1, math.ceil(len(table) / size))
    order = RowOrder(len(table), config.seed, config.shuffle)
    check_log_probs(policy.model, config.runtime.packed)
    module = TokenLogProbs(policy.model).train()
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], steps)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}

    resumed = state.load(run, accelerator)
    start = resumed["step"] if resumed else 0
    if start == 0 and held is not None:
        run.log(0, {"heldout_loss_before": _heldout_loss(config, accelerator, policy, module, held)})
    clock, tokens = perf_counter(), 0
    for step in range(start, steps):
        indices = order.take(step * size, size)
        total = target_count(table, indices, config.loss_on)
        tokens += int(table.lengths[indices].sum())
        lr = scheduler.get_last_lr()[0]
        metrics = optimization_step(
            accelerator,
            module,
            optimizer,
            scheduler,
            _micro_batches(config, accelerator, policy, table, indices),
            lambda batch, total=total: nll_loss(module(batch), batch.target_BT, total),
            clip,
            lambda step=step, indices=indices: f"step {step + 1}, rows {sorted((table.rows[indices] + 1).tolist())} of train",
        )
        done = step + 1
        if done % config.runtime.log_every == 0 or done == steps:
            run.log(done, metrics | {"lr": lr, "tokens_per_second": tokens / (perf_counter() - clock)})
            run.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if held is not None and (done % steps_an_epoch == 0 or done == steps):
            run.log(done, {"heldout_loss": _heldout_loss(config, accelerator, policy, module, held)})
        if done % config.runtime.save_every == 0 or done == steps:
            state.save(run, accelerator, done, {})

    if accelerator.is_main_process:
        save_policy(policy, run.output("checkpoint"))
        _write_generations(config, run, policy, heldout or train, steps)
    accelerator.wait_for_everyone()


def _tokenise(config: SftConfig, run: Run, accelerator: Accelerator, policy: LoadedPolicy, data: Path, name: str) -> TokenTable:
    path = run.work / f"{name}.arrow"
    if accelerator.is_main_process and not path.is_file():
        rows = run.rows(data) if name == "train" else islice(run.rows(data), config.heldout_rows)
        limit = min(config.max_length, policy.context)
        counts = encode_demonstrations(path, rows, policy.tokenizer, policy.stops, limit, config.too_long)
        run.table(f"{name} rows", [{"what": what, "rows": count} for what, count in counts.items()])
    accelerator.wait_for_everyone()
    return TokenTable(path)


def _micro_batches(
    config: SftConfig, accelerator: Accelerator, policy: LoadedPolicy, table: TokenTable, indices: Sequence[int] | np.ndarray
) -> list[TokenBatch]:
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    runtime = config.runtime
    batches = list(micro_batches(table, mine, config.loss_on, runtime.micro_batch_tokens, runtime.packed, policy.pad_id))
    # A rank that is left without rows still takes part in the step, with a sequence of which no token counts.
    return batches or [pad([table.ids(0)], [int(table.lengths[0])], policy.pad_id, ())]


@torch.no_grad()
def _heldout_loss(
    config: SftConfig, accelerator: Accelerator, policy: LoadedPolicy, module: torch.nn.Module, held: TokenTable
) -> float:
    """Mean negative log-likelihood a token over the held-out rows, in nats."""
    module.eval()
    total = target_count(held, range(len(held)), config.loss_on)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in _micro_batches(config, accelerator, policy, held, range(len(held))):
        batch = batch.to(accelerator.device)
        loss += nll_loss(module(batch), batch.target_BT, total).double()
    module.train()
    return float(accelerator.reduce(loss, reduction="sum"))  # pyright: ignore[reportArgumentType]


def _write_generations(config: SftConfig, run: Run, policy: LoadedPolicy, data: Path, step: int) -> None:
    rows = list(islice(run.rows(data), config.generations))
    samples, _ = sample_rows(
        policy, rows, config.sampling, seed=config.seed, step=step, batch_size=config.runtime.generation_batch
    )
    records = [{name: value for name, value in sample.record(step, "sft").items() if name != "label"} for sample in samples]
    write_rows(run.output("generations"), records)
    run.table("generations", [{"prompt": str(r["prompt"])[-60:], "completion": r["completion"][:120]} for r in records[:4]])
