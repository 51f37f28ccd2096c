"""One optimizer step over micro-batches, on one rank or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stages.data.batching import TokenBatch
from stages.errors import InputError

Loss = Callable[[TokenBatch], torch.Tensor]
# For each metric's name: the parameters whose gradients are clipped together, and to which norm.
Clip = Mapping[str, tuple[Sequence[nn.Parameter], float]]


def optimization_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: AcceleratedOptimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Sequence[TokenBatch],
    loss: Loss,
    clip: Clip,
    describe: Callable[[], str],
    more: Sequence[tuple[TokenBatch, Loss]] = (),
) -> dict[str, float]:
    """Accumulate `loss` over this rank's micro-batches, clip, step. Returns the global loss and the gradient norms.

    `loss(batch)` must already be divided by the step's global count. DDP averages gradients over ranks, which the factor
    `num_processes` undoes, so the gradient is that of one process on the whole batch (contract 8). `more` are micro-batches
    with losses of their own, for the same gradient.

    Raises InputError before the weights change when the loss or the gradient is not finite; `describe` names the rows.
    """
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    # Those of `batches` come last: DDP waits, in the last backward pass, for the gradient of every parameter.
    work = [*more, *((batch, loss) for batch in batches)]
    for place, (batch, share) in enumerate(work):
        with nullcontext() if place == len(work) - 1 else _unsynced(accelerator, module):
            value = share(batch.to(accelerator.device))
            accelerator.backward(value * accelerator.num_processes)
        total += value.detach().double()
    norms = {name: accelerator.clip_grad_norm_(parameters, limit) for name, (parameters, limit) in clip.items()}
    total = accelerator.reduce(total, reduction="sum")
    metrics = {"loss": float(total)} | {name: float(norm) for name, norm in norms.items()}  # pyright: ignore[reportArgumentType]
    if not all(math.isfinite(value) for value in metrics.values()):
        raise InputError(
            f"{describe()}: {', '.join(f'{name} is {value}' for name, value in metrics.items())}; "
            "the weights were not changed. Look at these rows, lower the learning rate, or train in float32"
        )
    optimizer.step()
    scheduler.step()
    return metrics


def _unsynced(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[None]:
    """Gradients of this backward pass stay on this rank."""
    # Accelerate's own does nothing for a single rank of torchrun, though it wraps that too: DDP would then wait, in every
    # backward pass, for the gradient of every parameter.
    return module.no_sync() if isinstance(module, DistributedDataParallel) else accelerator.no_sync(module)
