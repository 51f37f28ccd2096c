"""What every training loop starts with: the device and its threads, the optimizer and its schedule."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from stages.errors import InputError
from stages.specs.base import Runtime
from stages.specs.common import Dtype, Optimizer

SMALL_MODEL = 1_000_000


def accelerator_for(runtime: Runtime, dtype: Dtype = "float32") -> Accelerator:
    """The Accelerator of a stage. Run under torchrun or `accelerate launch` it spans their processes.

    With `bfloat16` matrices are multiplied in it (autocast), while weights, optimizer, log-probs and losses stay float32.
    Raises InputError when a GPU is asked for that is not there: Accelerate would take the CPU without a word.
    """
    if runtime.device.startswith("cuda"):
        _, _, number = runtime.device.partition(":")
        there = torch.cuda.device_count()
        if int(number or 0) >= there:
            raise InputError(f"runtime.device is {runtime.device}, and this machine has {there} GPUs; use auto or cpu")
        if number:
            torch.cuda.set_device(runtime.device)
    # Accelerate keeps the first device and precision of a process for good; the stages of a pipeline may differ in them.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=runtime.device == "cpu", mixed_precision="bf16" if dtype == "bfloat16" else "no")


@atexit.register
def _leave_group() -> None:
    """Part from the other ranks: gloo's threads abort a process that ends while they run, one in four times."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_threads(runtime: Runtime, parameters: int) -> int:
    """Set torch's CPU threads and return them: the asked number, or one for a small model, on which more only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = runtime.threads or (1 if parameters < SMALL_MODEL else cores)
    torch.set_num_threads(threads)
    return threads


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def make_optimizer(
    parts: Sequence[tuple[Optimizer, Iterable[nn.Parameter]]], steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """One AdamW over parts of a module, each with settings of its own, and its schedule over `steps` optimizer steps.

    Weight decay is on matrices alone.
    """
    groups: list[dict[str, Any]] = []
    schedules: list[Callable[[int], float]] = []
    for config, parameters in parts:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        shared = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        groups.append(shared | {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay})
        groups.append(shared | {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0})
        schedules += [lambda step, config=config: rate(config, step, steps)] * 2
    optimizer = torch.optim.AdamW(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)


def rate(config: Optimizer, step: int, steps: int) -> float:
    """The share of the peak learning rate at a step counted from 0."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    left = 1.0 - (step - warmup) / max(1, steps - warmup)
    return max(0.0, left) if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
