"""GRPO's loss and gradient against `GRPOTrainer`'s own, on the same log-probs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from stages.objectives.aggregate import Aggregate
from stages.objectives.kl import kl_loss
from stages.objectives.policy import policy_loss

LIMIT = 12
TYPES: dict[str, Aggregate] = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Six completions of 1 to 10 tokens, off policy."""
    generator = torch.Generator().manual_seed(seed)
    logp, drift, anchor = torch.randn(3, 6, 10, generator=generator)
    lengths = torch.tensor([10, 1, 4, 7, 10, 3])
    return {
        "logp": logp - 2,
        "old": logp - 2 + 0.3 * drift,
        "ref": logp - 2 + 0.5 * anchor,
        "advantages": torch.randn(6, generator=generator),
        "mask": (torch.arange(10)[None] < lengths[:, None]).long(),
    }


def theirs(given: dict[str, torch.Tensor], kind: str, beta: float, corrected: bool, high: float) -> tuple[float, torch.Tensor]:
    """The trainer's loss, and its gradient by the log-probs."""
    logp = given["logp"].clone().requires_grad_()
    args = SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1)
    accelerator = SimpleNamespace(gather=lambda one: one, reduce=lambda one, **_: one, num_processes=1, sync_gradients=True)
    trainer: Any = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        beta=beta,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=high,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )
    ids = torch.zeros_like(given["mask"])
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": given["mask"]}
    inputs |= {"advantages": given["advantages"], "old_per_token_logps": given["old"], "ref_per_token_logps": given["ref"]}
    inputs |= {"num_items_in_batch": given["mask"].sum()}
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.item(), torch.autograd.grad(loss, logp)[0]


def ours(
    given: dict[str, torch.Tensor], how: Aggregate, beta: float, corrected: bool, high: float
) -> tuple[float, torch.Tensor]:
    logp, mask = given["logp"].clone().requires_grad_(), given["mask"]
    total = mask.shape[0] * LIMIT if how == "constant" else None
    advantages = given["advantages"][:, None].expand_as(logp)
    loss = policy_loss(logp, given["old"], advantages, mask, 0.2, high, how, total)
    loss = loss + beta * kl_loss(logp, given["ref"], mask, "k3", given["old"] if corrected else None, how, total)
    return loss.item(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("beta", "corrected", "high"), [(0.0, False, 0.28), (0.04, False, 0.2), (0.3, True, 0.28)])
def test_loss_and_gradient_are_the_trainers(kind: str, beta: float, corrected: bool, high: float) -> None:
    for seed in range(5):
        given = batch(seed)
        their_loss, their_gradient = theirs(given, kind, beta, corrected, high)
        our_loss, our_gradient = ours(given, TYPES[kind], beta, corrected, high)
        assert our_loss == pytest.approx(their_loss, abs=1e-6)
        torch.testing.assert_close(our_gradient, their_gradient, atol=1e-7, rtol=1e-5)
