"""Losses on pairs against a reference: value and gradient by every token's log-prob are `DPOTrainer`'s own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from stages.objectives import preference as ours
from stages.objectives import preference_variants as variants

PROMPT, T = 2, 10  # a row is a prompt of two tokens and a completion of up to ten
LENGTHS = torch.tensor([10, 3, 1, 7, 4, 2, 10, 5, 7, 1])  # five chosen, five rejected
SCALE = 1.5  # log-ratios of a few nats a completion: on both sides of every threshold

Quantities = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Batch(NamedTuple):
    logp_BT: torch.Tensor
    ref_logp_BT: torch.Tensor
    mask_BT: torch.Tensor


def batch(seed: int, lengths_B: torch.Tensor = LENGTHS) -> Batch:
    """Chosen rows, then as many rejected ones."""
    generator = torch.Generator().manual_seed(seed)
    logp, drift = torch.randn(2, len(lengths_B), T, generator=generator)
    mask = (torch.arange(T)[None] < lengths_B[:, None]).long()
    return Batch((logp - 3) * mask, (logp - 3 + SCALE * drift) * mask, mask)


def theirs(
    given: Batch, kinds: Sequence[str], weights: Sequence[float], beta: float, smoothing: float
) -> tuple[float, torch.Tensor]:
    """The trainer's loss, and its gradient by the log-probs. Its model is one whose log-probs are known."""
    logp = given.logp_BT.clone().requires_grad_()
    zeros = torch.zeros(len(logp), PROMPT - 1)
    padded = torch.cat([zeros, logp * given.mask_BT], -1)  # one fewer than the tokens: nothing predicts the first one
    outputs = SimpleNamespace(log_probs=padded, entropy=padded, mean_logits=padded, is_top1=padded > 0)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda one: one, gather_for_metrics=lambda one: one),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(kinds),
        loss_weights=list(weights),
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.cat([torch.zeros(len(logp), PROMPT, dtype=torch.long), given.mask_BT], -1)
    chosen, rejected = given.ref_logp_BT.sum(-1).chunk(2)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss.item(), torch.autograd.grad(loss, logp)[0]


def quantities(given: Batch) -> tuple[torch.Tensor, Quantities, Quantities]:
    """The log-probs as a leaf; (pc, pr, rc, rr) as sums, and as means a token."""
    logp = given.logp_BT.clone().requires_grad_()
    pc, pr = (logp * given.mask_BT).sum(-1).chunk(2)
    rc, rr = given.ref_logp_BT.sum(-1).chunk(2)
    chosen, rejected = given.mask_BT.sum(-1).chunk(2)
    return logp, (pc, pr, rc, rr), (pc / chosen, pr / rejected, rc / chosen, rr / rejected)


def same(given: Batch, logp: torch.Tensor, losses_B: torch.Tensor, kinds: Sequence[str], *settings: Any) -> None:
    their_loss, their_gradient = theirs(given, kinds, *settings)
    assert losses_B.shape == (len(logp) // 2,)
    assert losses_B.mean().item() == pytest.approx(their_loss, abs=1e-5, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(losses_B.mean(), logp)[0], their_gradient, atol=1e-6, rtol=1e-5)


PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": ours.dpo,
    "hinge": variants.hinge,
    "nca_pair": variants.nca,
    "bco_pair": variants.bco,
    "sppo_hard": variants.sppo,
    "apo_zero": variants.apo_zero,
    "apo_down": variants.apo_down,
    "discopop": variants.discopop,
}
MEANS: dict[str, Callable[..., torch.Tensor]] = {"sigmoid_norm": ours.length_normalised_dpo, "ipo": ours.ipo}
SMOOTHED: dict[str, Callable[..., torch.Tensor]] = {"robust": ours.robust_dpo, "exo_pair": variants.exo}


@pytest.mark.parametrize("kind", [*PLAIN, *MEANS])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_loss_and_gradient_are_the_trainers(kind: str, beta: float) -> None:
    for seed in range(4):
        given = batch(seed)
        logp, sums, means = quantities(given)
        losses = PLAIN[kind](*sums, beta) if kind in PLAIN else MEANS[kind](*means, beta)
        same(given, logp, losses, [kind], [1.0], beta, 0.0)


@pytest.mark.parametrize("kind", SMOOTHED)
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.02), (0.5, 0.3), (2.0, 0.1)])
def test_loss_and_gradient_with_label_smoothing_are_the_trainers(kind: str, beta: float, smoothing: float) -> None:
    for seed in range(4):
        given = batch(seed)
        logp, sums, _ = quantities(given)
        same(given, logp, SMOOTHED[kind](*sums, beta, smoothing), [kind], [1.0], beta, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_conservative_dpo_is_the_trainers_aot_of_one_pair(smoothing: float) -> None:
    """TRL's sigmoid has no label smoothing any more; its AOT sorts a batch's log-ratios and has it: of one pair it is cDPO."""
    for seed in range(4):
        given = batch(seed, torch.tensor([5, 8]))
        logp, sums, _ = quantities(given)
        same(given, logp, ours.dpo(*sums, 0.3, smoothing), ["aot"], [1.0], 0.3, smoothing)


def test_the_trainers_nll_is_a_mean_over_the_batchs_tokens() -> None:
    given = batch(0)
    logp, sums, _ = quantities(given)
    tokens = given.mask_BT[:5].sum()
    losses = ours.dpo_nll(*sums, 0.2, 0.7, -sums[0] * 5 / tokens)
    same(given, logp, losses, ["sigmoid", "sft"], [1.0, 0.7], 0.2, 0.0)


def test_the_papers_nll_is_a_mean_over_each_completions_tokens() -> None:
    """RPO's: the trainer's where the chosen are equally long, another where not."""
    alike = batch(1, torch.tensor([6] * 5 + [1, 2, 3, 4, 5]))
    logp, sums, means = quantities(alike)
    same(alike, logp, ours.dpo_nll(*sums, 0.2, 0.7, -means[0]), ["sigmoid", "sft"], [1.0, 0.7], 0.2, 0.0)
    other = batch(1)
    _, sums, means = quantities(other)
    nll = sum(-other.logp_BT[b, : LENGTHS[b]].mean().item() for b in range(5)) / 5
    found = ours.dpo_nll(*sums, 0.2, 0.7, -means[0]).mean().item()
    assert found == pytest.approx(theirs(other, ["sigmoid"], [1.0], 0.2, 0.0)[0] + 0.7 * nll, abs=1e-5)
    assert found != pytest.approx(theirs(other, ["sigmoid", "sft"], [1.0, 0.7], 0.2, 0.0)[0], abs=1e-3)


def test_the_papers_ipo_is_on_sums() -> None:
    """Eq. 68 is on whole completions: the trainer's where each is one token long, another where not."""
    single = batch(2, torch.ones(10, dtype=torch.long))
    logp, sums, _ = quantities(single)
    same(single, logp, ours.ipo(*sums, 0.3), ["ipo"], [1.0], 0.3, 0.0)
    longer = batch(2)
    _, (pc, pr, rc, rr), _ = quantities(longer)
    expected = ((pc - pr) - (rc - rr) - 1 / 0.6).square().mean().item()
    assert ours.ipo(pc, pr, rc, rr, 0.3).mean().item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(theirs(longer, ["ipo"], [1.0], 0.3, 0.0)[0], rel=0.1)
