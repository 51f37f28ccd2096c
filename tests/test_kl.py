"""KL estimators: values by hand, expectations by enumeration, and above all the sign of their gradients (contract 12)."""

from __future__ import annotations

import math

import pytest
import torch

from stages.objectives.kl import AdaptiveKL, Estimator, kl, kl_loss
from stages.objectives.policy import shape_rewards

LOGITS = torch.tensor([0.3, -0.5, 1.1, 0.0])
REFERENCE = torch.tensor([0.0, 0.4, 0.2, -0.3]).log_softmax(-1)


def exact_kl(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - REFERENCE)).sum()


def exact_gradient() -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(exact_kl(logits), logits)[0]


@pytest.mark.parametrize(
    ("estimator", "value"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_values_by_hand(estimator: Estimator, value: float) -> None:
    """The policy is twice as likely as the reference."""
    logp, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl(logp, reference, estimator).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased(estimator: Estimator) -> None:
    logp = LOGITS.log_softmax(-1)
    torch.testing.assert_close((logp.exp() * kl(logp, REFERENCE, estimator)).sum(), exact_kl(LOGITS))


def expected_loss(logits: torch.Tensor, old: torch.Tensor, estimator: Estimator, weighted: bool) -> torch.Tensor:
    """E over tokens of the old policy of the loss, the whole vocabulary enumerated and weighted by the old probability."""
    logp = logits.log_softmax(-1)
    losses = [
        kl_loss(
            logp[v].view(1, 1), REFERENCE[v].view(1, 1), torch.ones(1, 1), estimator, old[v].view(1, 1) if weighted else None
        )
        for v in range(len(logits))
    ]
    return (old.exp() * torch.stack(losses)).sum()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_on_policy_loss_gradient_penalises_drift(estimator: Estimator, weighted: bool) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = expected_loss(logits, LOGITS.log_softmax(-1), estimator, weighted)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert torch.dot(gradient, exact_gradient()) > 0, "a step down this gradient lowers the KL"
    if estimator == "k2" or weighted:
        torch.testing.assert_close(gradient, exact_gradient(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_off_policy_weights_give_the_same_gradient(estimator: Estimator) -> None:
    """Tokens of another policy, weighted by pi/old: the gradient is still that of the KL."""
    logits = LOGITS.clone().requires_grad_()
    old = torch.tensor([1.0, 0.0, -1.0, 0.5]).log_softmax(-1)
    gradient = torch.autograd.grad(expected_loss(logits, old, estimator, weighted=True), logits)[0]
    torch.testing.assert_close(gradient, exact_gradient(), atol=1e-6, rtol=1e-5)


def reward_ascent(estimator: Estimator) -> torch.Tensor:
    """The policy gradient of the shaped reward, enumerated: E[-penalty(y) grad log pi(y)]."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    reward = shape_rewards(torch.zeros(4), logp.view(4, 1), REFERENCE.view(4, 1), torch.ones(4, 1), 1.0, estimator).view(4)
    return torch.autograd.grad((logp.exp().detach() * reward * logp).sum(), logits)[0]


def test_k1_in_the_reward_is_the_gradient_of_the_kl() -> None:
    torch.testing.assert_close(reward_ascent("k1"), -exact_gradient(), atol=1e-6, rtol=1e-5)


def test_k3_in_the_reward_is_a_difference_of_two_kls() -> None:
    """Why only k1 penalises drift in the reward: k3's own dependence on the policy is lost there, and what is left is
    grad KL(pi || ref) - grad KL(ref || pi), in which the leading terms cancel. Here it even points up the KL."""
    logits = LOGITS.clone().requires_grad_()
    backward_kl = (REFERENCE.exp() * (REFERENCE - logits.log_softmax(-1))).sum()
    difference = exact_gradient() - torch.autograd.grad(backward_kl, logits)[0]
    torch.testing.assert_close(reward_ascent("k3"), -difference, atol=1e-6, rtol=1e-5)
    assert torch.dot(reward_ascent("k3"), exact_gradient()) > 0
    assert torch.dot(reward_ascent("k2"), exact_gradient()) > 0


def test_k1_is_refused_as_a_loss() -> None:
    with pytest.raises(ValueError, match="0 in expectation"):
        kl_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "k1")


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_nan_outside_the_mask_does_not_leak(estimator: Estimator) -> None:
    logp = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    other = torch.tensor([[-2.0, float("nan")]])
    loss = kl_loss(logp, other, torch.tensor([[1, 0]]), estimator, other)
    loss.backward()
    assert loss.isfinite()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_adaptive_coefficient() -> None:
    controller = AdaptiveKL(target=0.03, coefficient=0.2)
    assert controller.update(0.03 / 1.5 - 1e-6) == 0.1
    assert controller.update(0.03) == 0.1
    assert controller.update(0.03 * 1.5 + 1e-6) == 0.2
    assert controller.coefficient == 0.2
    with pytest.raises(ValueError, match="must be positive"):
        AdaptiveKL(0, 1)
