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
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from stages.data.parquet import write_rows
from stages.models.load import LoadedPolicy, load_policy, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.likelihood import nll_loss
from stages.rollouts.sample import sample_rows
from stages.run import Run
from stages.specs.sft import SftConfig
from stages.training import state
from stages.training.demonstrations import Demonstrations, load_demonstrations
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import optimization_step


def sft(config: SftConfig, run: Run, *, model: Path, train: Path, heldout: Path | None = None) -> None:
    """Fine-tune `model` on `train`; write `checkpoint` and `generations` on held-out prompts (on training ones without any)."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    policy = load_policy(model, seed=config.seed)
    set_threads(config.runtime, count_parameters(policy.model))
    rows = load_demonstrations(run, accelerator, policy, train, "train", config, config.runtime)
    held = None
    if heldout and config.heldout_rows:
        held = load_demonstrations(run, accelerator, policy, heldout, "heldout", config, config.runtime, config.heldout_rows)

    size = config.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / size))
    steps_an_epoch = max(1, math.ceil(len(rows) / size))
    order = rows.order(config.seed, config.shuffle)
    check_log_probs(policy.model, config.runtime.packed)
    module = TokenLogProbs(policy.model).train()
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], steps)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}

    resumed = state.load(run, accelerator)
    start = resumed["step"] if resumed else 0
    if start == 0 and held is not None:
        run.log(0, {"heldout_loss_before": _heldout_loss(accelerator, module, held)})
    clock, tokens = perf_counter(), 0
    for step in range(start, steps):
        indices = order.take(step * size, size)
        total = rows.count(indices)
        tokens += int(rows.table.lengths[indices].sum())
        lr = scheduler.get_last_lr()[0]
        metrics = optimization_step(
            accelerator,
            module,
            optimizer,
            scheduler,
            rows.share(indices),
            lambda batch, total=total: nll_loss(module(batch), batch.target_BT, total),
            clip,
            lambda step=step, indices=indices: f"step {step + 1}, rows {rows.named(indices)} of train",
        )
        done = step + 1
        if done % config.runtime.log_every == 0 or done == steps:
            run.log(done, metrics | {"lr": lr, "tokens_per_second": tokens / (perf_counter() - clock)})
            run.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if held is not None and (done % steps_an_epoch == 0 or done == steps):
            run.log(done, {"heldout_loss": _heldout_loss(accelerator, module, held)})
        if done % config.runtime.save_every == 0 or done == steps:
            state.save(run, accelerator, done, {})

    if accelerator.is_main_process:
        save_policy(policy, run.output("checkpoint"))
        _write_generations(config, run, policy, heldout or train, steps)
    accelerator.wait_for_everyone()


@torch.no_grad()
def _heldout_loss(accelerator: Accelerator, module: torch.nn.Module, held: Demonstrations) -> float:
    """Mean negative log-likelihood a token over the held-out rows, in nats."""
    module.eval()
    everything = range(len(held))
    total = held.count(everything)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in held.share(everything):
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
