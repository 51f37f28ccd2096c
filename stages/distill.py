"""Distillation: a student learns from a teacher (DeepSeek-R1, rl4llm 6.7.5; GKD, arXiv 2306.13649).

    for each step:
        y: batch_size of the teacher's accepted outputs, or completions that the student draws now to their prompts
        L = mean over the tokens of y of
                - log student(y_t)                            likelihood
                KL(teacher || student) at y_t                 forward_kl
                KL(student || teacher) at y_t                 reverse_kl
        AdamW step
    after each epoch: the held-out loss, which is the likelihood's whatever L is

The KLs sum over the whole vocabulary. No gradient flows through what the student draws. The student's dropout is on as in SFT,
but for drawing.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from stages.data.batching import RowOrder, TokenBatch
from stages.errors import InputError
from stages.models.divergence import TokenDivergence
from stages.models.load import LoadedPolicy, load_policy, require_same_tokens, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.likelihood import nll_loss
from stages.rollouts.collect import collect, usable_prompts
from stages.rollouts.sample import Row
from stages.run import Run
from stages.specs.distill import DistillConfig
from stages.training.demonstrations import load_demonstrations
from stages.training.setup import accelerator_for, count_parameters, set_threads
from stages.training.supervised import Work, demonstration_work, fit, heldout_loss, write_generations


def distill(
    config: DistillConfig,
    run: Run,
    *,
    model: Path,
    train: Path,
    heldout: Path | None = None,
    teacher: Path | None = None,
) -> None:
    """Train the student `model` on `train`, the teacher's outputs; write `checkpoint` and `generations`. Raises InputError when
    a KL has no teacher, or one that reads other tokens, and when a likelihood has one that it would not ask."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    set_seed(config.seed, device_specific=True)  # dropout's
    student = load_policy(model, seed=config.seed)
    set_threads(config.runtime, count_parameters(student.model))
    check_log_probs(student.model, config.runtime.packed)
    taught_by = _load_teacher(config, accelerator, student, teacher)
    module: nn.Module = TokenLogProbs(student.model)
    if taught_by is not None and config.objective != "likelihood":
        module = TokenDivergence(student.model, taught_by.model, config.objective)
    rows = load_demonstrations(run, accelerator, student, train, "train", config, config.runtime)
    held = None
    if heldout and config.heldout_rows:
        held = load_demonstrations(run, accelerator, student, heldout, "heldout", config, config.runtime, config.heldout_rows)

    size = config.batch_size
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / size))
    order = rows.order(config.seed, config.shuffle)
    prompts: list[Row] = []
    if config.source == "student":
        readers = [] if taught_by is None else [taught_by]
        prompts = usable_prompts(run, train, student, readers, config.student_sampling.max_new_tokens)
        order = RowOrder(len(prompts), config.seed, config.shuffle)

    def draw(step: int) -> Work:
        indices = order.take(step * size, size)
        if config.source == "demonstrations":
            return demonstration_work(rows, indices)
        return _drawn(config, accelerator, student, [prompts[place] for place in indices], step)

    def loss(module: nn.Module, batch: TokenBatch, total: int) -> torch.Tensor:
        if config.objective == "likelihood":
            return nll_loss(module(batch), batch.target_BT, total)
        return module(batch).sum() / total

    def measure(module: nn.Module) -> float:
        assert held is not None
        del module  # its forward may be a divergence
        with accelerator.autocast():
            return heldout_loss(accelerator, TokenLogProbs(student.model), held)

    epoch = max(1, math.ceil(order.rows / size))
    fit(config, run, accelerator, module, steps, draw, loss, measure if held is not None else None, epoch)
    if accelerator.is_main_process:
        save_policy(student, run.output("checkpoint"))
        write_generations(config, run, student, heldout or train, steps, "student")
    accelerator.wait_for_everyone()


def _load_teacher(
    config: DistillConfig, accelerator: Accelerator, student: LoadedPolicy, folder: Path | None
) -> LoadedPolicy | None:
    """The teacher that a KL asks."""
    if config.objective == "likelihood":
        if folder is not None:
            raise InputError("there is an input teacher, but objective likelihood reads its outputs alone; set a KL")
        return None
    if folder is None:
        raise InputError(
            f"objective {config.objective} compares distributions: give the teacher's checkpoint as the input teacher"
        )
    teacher = load_policy(folder)
    require_same_tokens(student, teacher=teacher)
    if teacher.context < min(config.max_length, student.context):
        raise InputError(
            f"the teacher reads {teacher.context} tokens, and a demonstration may have more: set max_length to that"
        )
    check_log_probs(teacher.model, config.runtime.packed)
    teacher.model.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    return teacher


def _drawn(config: DistillConfig, accelerator: Accelerator, student: LoadedPolicy, rows: list[Row], step: int) -> Work:
    """Completions of the student as a step's work."""
    rollouts = collect(accelerator, student, rows, config.student_sampling, config.seed, step, config.runtime)
    batches = rollouts.share(accelerator, range(len(rollouts)), config.runtime, student.pad_id)
    tokens = sum(len(rollouts.ids(place)) for place in range(len(rollouts)))
    return Work(batches, int(rollouts.lengths_B.sum()), tokens, f"prompts {sorted(row['id'] for row in rows)}")
