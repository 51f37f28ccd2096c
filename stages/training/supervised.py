"""The loop of every stage that learns from given tokens, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator

from stages.data.batching import TokenBatch
from stages.data.parquet import write_rows
from stages.models.load import LoadedPolicy
from stages.objectives.likelihood import nll_loss
from stages.rollouts.sample import sample_rows
from stages.run import Run
from stages.specs.sft import SftConfig
from stages.training import state
from stages.training.demonstrations import Demonstrations
from stages.training.setup import make_optimizer
from stages.training.step import optimization_step


@dataclass(frozen=True)
class Work:
    """What an optimizer step learns from: this process's micro-batches; over all processes how many tokens carry loss, and how
    many there are; and the rows, in words."""

    batches: Sequence[TokenBatch]
    total: int
    tokens: int
    rows: str


def demonstration_work(rows: Demonstrations, indices: np.ndarray) -> Work:
    """Some demonstrations as a step's work."""
    tokens = int(rows.table.lengths[indices].sum())
    return Work(rows.share(indices), rows.count(indices), tokens, f"rows {rows.named(indices)} of train")


def fit(
    config: SftConfig,
    run: Run,
    accelerator: Accelerator,
    module: torch.nn.Module,
    steps: int,
    draw: Callable[[int], Work],
    loss: Callable[[torch.nn.Module, TokenBatch, int], torch.Tensor],
    heldout: Callable[[torch.nn.Module], float] | None,
    steps_an_epoch: int,
) -> None:
    """Train a module in place for `steps` steps, going on from the newest state: `draw` gives a step's work, `loss` a
    micro-batch's share of the step's loss, `heldout` the held-out loss, before training and after every epoch."""
    module.train()
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], steps)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}
    resumed = state.load(run, accelerator)
    start = resumed["step"] if resumed else 0
    if start == 0 and heldout is not None:
        run.log(0, {"heldout_loss_before": heldout(module)})
    clock, tokens = perf_counter(), 0
    for step in range(start, steps):
        work = draw(step)
        tokens += work.tokens
        lr = scheduler.get_last_lr()[0]
        metrics = optimization_step(
            accelerator,
            module,
            optimizer,
            scheduler,
            work.batches,
            lambda batch, total=work.total: loss(module, batch, total),
            clip,
            lambda step=step, work=work: f"step {step + 1}, {work.rows}",
        )
        done = step + 1
        if done % config.runtime.log_every == 0 or done == steps:
            run.log(done, metrics | {"lr": lr, "tokens_per_second": tokens / (perf_counter() - clock)})
            run.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if heldout is not None and (done % steps_an_epoch == 0 or done == steps):
            run.log(done, {"heldout_loss": heldout(module)})
        if done % config.runtime.save_every == 0 or done == steps:
            state.save(run, accelerator, done, {})


@torch.no_grad()
def heldout_loss(accelerator: Accelerator, log_probs: torch.nn.Module, held: Demonstrations) -> float:
    """Mean negative log-likelihood a token over the held-out rows, in nats. The module is left as it was."""
    was_training = log_probs.training
    log_probs.eval()
    everything = range(len(held))
    total = held.count(everything)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in held.share(everything):
        batch = batch.to(accelerator.device)
        loss += nll_loss(log_probs(batch), batch.target_BT, total).double()
    log_probs.train(was_training)
    return float(accelerator.reduce(loss, reduction="sum"))  # pyright: ignore[reportArgumentType]


def write_generations(config: SftConfig, run: Run, policy: LoadedPolicy, data: Path, step: int, who: str) -> None:
    """Completions of the first rows' prompts, in `generations`; `who` has drawn them."""
    rows = list(islice(run.rows(data), config.generations))
    samples, _ = sample_rows(
        policy, rows, config.sampling, seed=config.seed, step=step, batch_size=config.runtime.generation_batch
    )
    records = [{name: value for name, value in sample.record(step, who).items() if name != "label"} for sample in samples]
    write_rows(run.output("generations"), records)
    run.table("generations", [{"prompt": str(r["prompt"])[-60:], "completion": r["completion"][:120]} for r in records[:4]])
