"""The surrogate: the worked example, the four clipping cases by sign, aggregation, penalties, entropy, shaped rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.aggregate import Aggregate
from stages.objectives.policy import entropy_BT, kl_penalty_loss, policy_loss, policy_metrics, shape_rewards


def one_token(ratio: float, advantage: float) -> tuple[torch.Tensor, float]:
    """(loss, gradient of the loss by log pi) of one token."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1))
    return loss, torch.autograd.grad(loss, logp)[0].item()


def test_the_worked_surrogate() -> None:
    """worked-examples.txt: ratio 1.1 and advantage 1.4 give the surrogate 1.54 (errata in DESIGN 8)."""
    assert one_token(1.1, 1.4)[0].item() == pytest.approx(-1.54, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # a good action, likelier by enough: no more push
        (0.5, 1.0, -0.5, -0.5),  # a good action that is being forgotten: full push up
        (0.5, -1.0, 0.8, 0.0),  # a bad action, rarer by enough: no more push
        (1.5, -1.0, 1.5, 1.5),  # a bad action that became likelier: full push down, without bound
        (1.1, 1.0, -1.1, -1.1),  # inside the region: the plain policy gradient
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_clipping_by_sign(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    got_loss, got_gradient = one_token(ratio, advantage)
    assert got_loss.item() == pytest.approx(loss, abs=1e-6)
    assert got_gradient == pytest.approx(gradient, abs=1e-6)


def test_the_two_clips_are_apart() -> None:
    logp, zeros, mask = torch.tensor([[math.log(1.3), math.log(0.6)]]), torch.zeros(1, 2), torch.ones(1, 2)
    advantages = torch.tensor([[1.0, -1.0]])
    loss = policy_loss(logp, zeros, advantages, mask, clip_low=0.3, clip_high=0.25, aggregate="token")
    assert loss.item() == pytest.approx((-1.25 + 0.7) / 2, abs=1e-6)


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logp, old, advantages = torch.randn(3, 4, 6, generator=generator)
    mask = (torch.rand(4, 6, generator=generator) < 0.6).float()
    mask[0] = 0
    return logp, old, advantages, mask


@pytest.mark.parametrize("how", ["sequence", "token", "constant"])
def test_aggregation_against_loops(how: Aggregate) -> None:
    logp, old, advantages, mask = random_batch(0)
    ratio = (logp - old).exp()
    tokens = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    rows = [[tokens[b, t].item() for t in range(6) if mask[b, t]] for b in range(4)]
    expected = {
        "sequence": sum(sum(row) / len(row) for row in rows if row) / sum(bool(row) for row in rows),
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "constant": sum(map(sum, rows)) / 100,
    }[how]
    loss = policy_loss(logp, old, advantages, mask, aggregate=how, total=100 if how == "constant" else None)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["sequence", "token", "constant"]))
def test_micro_batches_sum_to_the_whole(seed: int, how: Aggregate) -> None:
    """With the global count as `total`, losses of parts add up to the loss of the whole (contract 8)."""
    logp, old, advantages, mask = random_batch(seed)
    total = {"sequence": (mask.sum(-1) > 0).sum().item(), "token": mask.sum().item(), "constant": 7.0}[how]
    whole = policy_loss(logp, old, advantages, mask, aggregate=how, total=total)
    rows = zip(logp.split(1), old.split(1), advantages.split(1), mask.split(1), strict=True)
    parts = [policy_loss(p, o, a, m, aggregate=how, total=total) for p, o, a, m in rows]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_nan_outside_the_mask_does_not_leak() -> None:
    logp = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    poison = torch.tensor([[-1.5, float("inf")]])
    mask = torch.tensor([[1, 0]])
    for loss in (policy_loss(logp, poison, poison, mask), kl_penalty_loss(logp, poison, poison, mask, 0.1)):
        gradient = torch.autograd.grad(loss, logp)[0]
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0
    assert all(value.isfinite() for value in policy_metrics(logp, poison, poison, mask).values())


def test_first_update_has_ratio_1_and_the_plain_policy_gradient() -> None:
    logp, _, advantages, mask = random_batch(1)
    logp.requires_grad_()
    for loss in (
        policy_loss(logp, logp.detach(), advantages, mask, aggregate="token"),
        kl_penalty_loss(logp, logp.detach(), advantages, mask, 0.5),
    ):
        gradient = torch.autograd.grad(loss, logp)[0]
        torch.testing.assert_close(gradient, -advantages * mask / mask.sum())


def test_kl_penalty_is_the_kl_to_the_old_policy() -> None:
    """Enumerated over a vocabulary: the penalty's expectation under the old policy is KL(old || pi), gradient included."""
    logits = torch.tensor([0.2, -1.0, 0.7], requires_grad=True)
    old = torch.tensor([0.0, 0.3, -0.2]).log_softmax(-1)
    logp = logits.log_softmax(-1)
    losses = [
        kl_penalty_loss(logp[v].view(1, 1), old[v].view(1, 1), torch.zeros(1, 1), torch.ones(1, 1), 1.0) for v in range(3)
    ]
    expected = (old.exp() * (old - logp)).sum()
    got = (old.exp() * torch.stack(losses)).sum()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits, retain_graph=True)[0], torch.autograd.grad(expected, logits)[0])


def test_metrics_by_hand() -> None:
    logp = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5), 9.0]])
    advantages, mask = torch.tensor([[1.0, 1.0, -1.0, 1.0]]), torch.tensor([[1, 1, 1, 0]])
    metrics = policy_metrics(logp, torch.zeros(1, 4), advantages, mask)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    expected = (2 * (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))) / 3
    assert metrics["old_policy_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, float("-inf"), 0.0, float("-inf")], [50.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(entropy_BT(logits), torch.tensor([[math.log(4), math.log(2), 0.0]]), atol=1e-6, rtol=0)
    logits.requires_grad_()
    assert torch.autograd.grad(entropy_BT(logits).sum(), logits)[0].isfinite().all()


def test_entropy_of_bfloat16_logits_is_float32() -> None:
    assert entropy_BT(torch.randn(1, 2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_shaped_rewards_by_hand() -> None:
    """Eq. 7: minus beta log(pi/ref) at every token, the score at the last token inside the mask."""
    logp, reference = torch.tensor([[-1.0, -2.0, -3.0, 9.0]] * 2), torch.tensor([[-1.5, -1.0, -3.0, float("nan")]] * 2)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    shaped = shape_rewards(torch.tensor([5.0, 7.0]), logp, reference, mask, beta=0.1)
    torch.testing.assert_close(shaped, torch.tensor([[0.0, 0.1, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
