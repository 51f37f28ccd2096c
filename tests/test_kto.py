"""KTO: `KTOTrainer`'s own value and gradient, hand-worked numbers, the reference point, saturation, weights."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.kto_trainer import KTOTrainer

from stages.objectives.preference import kto, kto_reference_point, kto_weights
from stages.objectives.preference_variants import apo_zero

T = 8
LENGTHS = torch.tensor([8, 3, 1, 6, 5])
LABELS = {
    "both": [True, False, False, True, True],
    "desirable": [True] * 5,
    "undesirable": [False] * 5,
}


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs a token of policy and reference, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    logp, drift = torch.randn(2, 5, T, generator=generator)
    mask = (torch.arange(T)[None] < LENGTHS[:, None]).long()
    return (logp - 2) * mask, (logp - 2 + drift) * mask, mask


def theirs(
    seed: int, labels: list[bool], mismatched: tuple[torch.Tensor, torch.Tensor], beta: float, **settings: Any
) -> tuple[float, torch.Tensor]:
    """The trainer's loss, and its gradient by the log-probs. Its model is one whose log-probs are known."""
    logp, reference, mask = rows(seed)
    logp.requires_grad_()
    outputs = SimpleNamespace(log_probs=logp * mask, entropy=logp, mean_logits=logp)
    prompted = torch.cat([torch.zeros(5, 1, dtype=torch.long), mask], -1)
    inputs = {"input_ids": torch.zeros_like(prompted), "completion_mask": prompted, "attention_mask": prompted}
    inputs |= {"label": torch.tensor(labels), "ref_logps": reference.sum(-1), "ref_KL_logps": mismatched[1]}
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda one: one),
        _compute_kl_logps=lambda *_: mismatched[0],
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(settings)
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss.item(), torch.autograd.grad(loss, logp)[0]


def same(seed: int, losses_B: torch.Tensor, logp: torch.Tensor, expected: tuple[float, torch.Tensor]) -> None:
    assert losses_B.mean().item() == pytest.approx(expected[0], abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(losses_B.mean(), logp)[0], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    ("drift", "beta", "weights"), [(2.0, 0.1, (1.0, 1.0)), (2.0, 0.5, (1.3, 0.7)), (-2.0, 0.3, (0.5, 2.0))]
)
def test_loss_and_gradient_are_the_trainers(
    labels: list[bool], drift: float, beta: float, weights: tuple[float, float]
) -> None:
    """The trainer's reference point is a KL, times beta later; ours is eq. 71's, in units of the reward. Drift < 0: it is 0."""
    for seed in range(3):
        ref_mismatched = -10 * torch.rand(5, generator=torch.Generator().manual_seed(seed + 50))
        mismatched = ref_mismatched + drift * torch.rand(5, generator=torch.Generator().manual_seed(seed + 90))
        z = kto_reference_point(mismatched, ref_mismatched, beta)
        assert (z > 0) == (drift > 0)
        settings = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        expected = theirs(seed, labels, (mismatched, ref_mismatched), beta, **settings)
        logp, reference, mask = rows(seed)
        logp.requires_grad_()
        losses = kto((logp * mask).sum(-1), reference.sum(-1), torch.tensor(labels), z, beta, *weights)
        same(seed, losses, logp, expected)


def test_without_a_reference_point_it_is_the_trainers_unpaired_apo_zero() -> None:
    for seed in range(3):
        settings = {"loss_type": "apo_zero_unpaired", "calculate_KL": False}
        expected = theirs(seed, LABELS["both"], (torch.zeros(5), torch.zeros(5)), 0.4, **settings)
        logp, reference, mask = rows(seed)
        logp.requires_grad_()
        losses = kto((logp * mask).sum(-1), reference.sum(-1), torch.tensor(LABELS["both"]), 0.0, 0.4)
        same(seed, losses, logp, expected)


def test_apo_zero_is_the_two_halves_of_a_pair() -> None:
    pc, pr, rc, rr = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(6)
    halves = kto(pc, rc, ones, 0.0, 0.7) + kto(pr, rr, 1 - ones, 0.0, 0.7)
    torch.testing.assert_close(apo_zero(pc, pr, rc, rr, 0.7), halves)


def test_a_gain_and_a_loss_by_hand() -> None:
    """r = .1 x 30 = 3 and .1 x -10 = -1, z = 1: gains of 2 and -2. Desirable 1 - s(2), undesirable 1 - s(2) too."""
    losses = kto(torch.tensor([-20.0, -60.0]), torch.tensor([-50.0, -50.0]), torch.tensor([1, 0]), 1.0, 0.1, 1.5, 0.5)
    below = 1 / (1 + math.exp(2))
    assert losses.tolist() == pytest.approx([1.5 * below, 0.5 * below], rel=1e-5)


def test_the_reference_point_by_hand() -> None:
    p, r = torch.tensor([-3.0, -5.0, -8.0], requires_grad=True), torch.tensor([-6.0, -6.0, -7.0])
    z = kto_reference_point(p, r, 0.5)
    assert z.item() == pytest.approx(0.5 * (3 + 1 - 1) / 3)
    assert not z.requires_grad
    assert kto_reference_point(r, p, 0.5).item() == 0.0


def test_no_mismatched_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="it takes a batch of two or more"):
        kto_reference_point(torch.zeros(0), torch.zeros(0), 0.1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nothing_is_pushed_when_saturated(sign: float) -> None:
    """Unlike DPO's, KTO's gradient goes to 0 on both sides: what is hopelessly wrong is taken for noise."""
    p = torch.tensor([sign * 1e4, sign * 1e4], requires_grad=True)
    losses = kto(p, torch.zeros(2), torch.tensor([1, 0]), 0.0, 0.1)
    assert losses.tolist() == [1.0 - max(sign, 0.0), max(sign, 0.0)]
    assert torch.autograd.grad(losses.sum(), p)[0].tolist() == [0.0, 0.0]


def test_the_push_is_strongest_at_the_reference_point() -> None:
    p = torch.tensor([4.9, 5.0, 5.1], requires_grad=True)
    gradient = torch.autograd.grad(kto(p, torch.zeros(3), torch.ones(3), 1.0, 0.2).sum(), p)[0]
    assert gradient[1].item() == pytest.approx(-0.2 / 4)
    assert (gradient[1] < gradient[[0, 2]]).all()


@pytest.mark.parametrize(
    ("counts", "weights", "inside", "desirable", "undesirable"),
    [
        ((100, 100), (1.0, 1.0), True, (1.0, 1.5), (2 / 3, 1.0)),
        ((200, 100), (1.0, 1.0), False, (0.5, 0.75), (4 / 3, 2.0)),
        ((200, 100), (0.75, 1.0), True, (0.5, 0.75), (1.0, 1.5)),
        ((100, 300), (3.0, 1.0), True, (3.0, 4.5), (2 / 3, 1.0)),
        ((100, 300), (1.0, 1.0), False, (3.0, 4.5), (2 / 9, 1 / 3)),
    ],
)
def test_weights_by_hand(
    counts: tuple[int, int],
    weights: tuple[float, float],
    inside: bool,
    desirable: tuple[float, float],
    undesirable: tuple[float, float],
) -> None:
    found = kto_weights(*counts, *weights)
    assert found.inside is inside
    assert found.w_desirable == pytest.approx(desirable)
    assert found.w_undesirable == pytest.approx(undesirable)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(1e-2, 1e2), st.floats(1e-2, 1e2))
def test_a_weight_at_either_end_is_inside_and_beyond_is_not(n_d: int, n_u: int, w_d: float, w_u: float) -> None:
    found = kto_weights(n_d, n_u, w_d, w_u)
    for end, beyond in zip(found.w_desirable, (0.999, 1.001), strict=True):
        assert kto_weights(n_d, n_u, end, w_u).inside
        assert not kto_weights(n_d, n_u, beyond * end, w_u).inside
    for end, beyond in zip(found.w_undesirable, (0.999, 1.001), strict=True):
        assert kto_weights(n_d, n_u, w_d, end).inside
        assert not kto_weights(n_d, n_u, w_d, beyond * end).inside


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_a_missing_class_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"both classes, there are {counts[0]} desirable and {counts[1]} undesirable"):
        kto_weights(*counts)
