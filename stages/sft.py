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
from pathlib import Path

import torch
from accelerate.utils import set_seed

from stages.data.batching import TokenBatch
from stages.models.load import load_policy, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.likelihood import nll_loss
from stages.run import Run
from stages.specs.sft import SftConfig
from stages.training.demonstrations import load_demonstrations
from stages.training.setup import accelerator_for, count_parameters, set_threads
from stages.training.supervised import Work, demonstration_work, fit, heldout_loss, write_generations


def sft(config: SftConfig, run: Run, *, model: Path, train: Path, heldout: Path | None = None) -> None:
    """Fine-tune `model` on `train`; write `checkpoint` and `generations` on held-out prompts (on training ones without any)."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    policy = load_policy(model, seed=config.seed)
    set_threads(config.runtime, count_parameters(policy.model))
    check_log_probs(policy.model, config.runtime.packed)
    rows = load_demonstrations(run, accelerator, policy, train, "train", config, config.runtime)
    held = None
    if heldout and config.heldout_rows:
        held = load_demonstrations(run, accelerator, policy, heldout, "heldout", config, config.runtime, config.heldout_rows)

    size = config.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / size))
    order = rows.order(config.seed, config.shuffle)

    def draw(step: int) -> Work:
        return demonstration_work(rows, order.take(step * size, size))

    def loss(module: torch.nn.Module, batch: TokenBatch, total: int) -> torch.Tensor:
        return nll_loss(module(batch), batch.target_BT, total)

    def measure(module: torch.nn.Module) -> float:
        assert held is not None
        return heldout_loss(accelerator, module, held)

    module, epoch = TokenLogProbs(policy.model), max(1, math.ceil(len(rows) / size))
    fit(config, run, accelerator, module, steps, draw, loss, measure if held is not None else None, epoch)
    if accelerator.is_main_process:
        save_policy(policy, run.output("checkpoint"))
        write_generations(config, run, policy, heldout or train, steps, "sft")
    accelerator.wait_for_everyone()
