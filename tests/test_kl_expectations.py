"""KL estimators over a whole small vocabulary: bias, variance and expected gradients are finite sums (rl4llm 6.4)."""

from __future__ import annotations

import categoricals
import pytest
import torch
from categoricals import LOGITS_TV, OLD_TV, REFERENCE_TV, close, divergence, forward_gradient, moments, reverse_gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.objectives.kl import Estimator, kl, kl_loss
from stages.objectives.policy import policy_loss, shape_rewards

LOGITS, REFERENCE, OLD = LOGITS_TV[0], REFERENCE_TV[0], OLD_TV[0]
LOGP = LOGITS.log_softmax(-1)
TRUE = reverse_gradient(LOGITS, REFERENCE)


def near(distance: float) -> tuple[Tensor, Tensor]:
    """(logits, log-probs) of a policy at that distance from the reference."""
    logits = REFERENCE + distance * categoricals.normal(3, 1.0)[0]
    return logits, logits.log_softmax(-1)


def test_the_oracles_are_gradients() -> None:
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    reverse, forward = divergence(logp, REFERENCE), divergence(REFERENCE, logp)
    torch.testing.assert_close(torch.autograd.grad(reverse, logits, retain_graph=True)[0], TRUE)
    torch.testing.assert_close(torch.autograd.grad(forward, logits)[0], forward_gradient(LOGITS, REFERENCE))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 3.0])
def test_k1_and_k3_are_unbiased(estimator: Estimator, distance: float) -> None:
    _, logp = near(distance)
    found, _ = moments(logp, kl(logp, REFERENCE, estimator))
    assert found == pytest.approx(divergence(logp, REFERENCE).item(), rel=1e-5, abs=1e-7)


def test_k2_is_biased_by_the_third_order() -> None:
    """Its mean is (Var(log r) + KL^2) / 2 (eq. 83): half as far from the reference, an eighth of the bias."""
    biases = []
    for distance in (0.2, 0.1):
        _, logp = near(distance)
        true, (mean, variance) = divergence(logp, REFERENCE).item(), moments(logp, logp - REFERENCE)
        found, _ = moments(logp, kl(logp, REFERENCE, "k2"))
        assert found == pytest.approx((variance + mean**2) / 2, rel=1e-5)
        biases.append(found - true)
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.15)


TILTS = st.lists(st.floats(-1, 1), min_size=5, max_size=7).filter(lambda tilts: max(tilts) - min(tilts) > 0.01)


@given(TILTS, st.floats(0.001, 0.3))
def test_near_the_reference_k3_varies_less_than_k1(tilts: list[float], distance: float) -> None:
    """Surely where the policy is nowhere less than half the reference: there k3 grows more slowly with log(pi/ref)."""
    reference = torch.arange(len(tilts), dtype=torch.float64).log_softmax(-1)
    logp = (reference + distance * torch.tensor(tilts, dtype=torch.float64)).log_softmax(-1)
    assert (reference - logp).exp().max() < 2
    (_, of_k1), (_, of_k3) = (moments(logp, kl(logp, reference, estimator)) for estimator in ("k1", "k3"))
    assert of_k3 < of_k1


def test_the_closer_the_less_k3_varies() -> None:
    """By the square of the distance, relative to k1: 1% of it at a distance where KL is 0.005."""
    ratios = []
    for distance in (0.2, 0.1):
        _, logp = near(distance)
        ratios.append(moments(logp, kl(logp, REFERENCE, "k3"))[1] / moments(logp, kl(logp, REFERENCE, "k1"))[1])
    assert ratios[0] / ratios[1] == pytest.approx(4, rel=0.3)
    assert ratios[1] < 0.02


def test_far_from_the_reference_k3_varies_more_than_k1() -> None:
    """A token that the policy has given up, but the reference has not: ref/pi is huge when it comes."""
    reference = torch.full((6,), 1 / 6, dtype=torch.float64).log()
    logp = torch.tensor([1.0, 0.0, 0.5, 0.2, -1.0, -7.0], dtype=torch.float64).log_softmax(-1)
    (_, of_k1), (_, of_k2), (_, of_k3) = (moments(logp, kl(logp, reference, name)) for name in ("k1", "k2", "k3"))
    assert of_k3 > 10 * of_k1
    assert of_k2 < of_k3


def by_logits(by_logp: Tensor, logp: Tensor) -> Tensor:
    """A gradient by the log-probs of a categorical as one by its logits."""
    return by_logp - by_logp.sum() * logp.detach().exp()


def expected_gradient(
    estimator: Estimator, logits: Tensor, sampler: Tensor, weighted: bool, reference: Tensor = REFERENCE
) -> Tensor:
    """By the logits, of the loss's expectation over tokens of the sampler (log-probs): sum of q(v) dloss/dlogp(v) dlogp(v)."""
    logp = logits.log_softmax(-1).requires_grad_()
    old = sampler[:, None] if weighted else None
    loss = kl_loss(logp[:, None], reference[:, None], torch.ones(len(logp), 1), estimator, old, "constant", 1)
    [by_logp] = torch.autograd.grad(loss, logp)
    return by_logits(sampler.exp() * by_logp, logp)


def test_k2_s_gradient_on_policy_is_the_kl_s() -> None:
    close(expected_gradient("k2", LOGITS, LOGP, weighted=False), TRUE)


def test_k3_s_gradient_on_policy_is_that_of_the_other_kl() -> None:
    """Its known bias: KL(ref || pi) instead of KL(pi || ref)."""
    found = expected_gradient("k3", LOGITS, LOGP, weighted=False)
    close(found, forward_gradient(LOGITS, REFERENCE))
    assert (found - TRUE).norm() > 0.2 * TRUE.norm()
    assert torch.dot(found, TRUE) > 0, "still a step down lowers the KL"


def test_near_the_reference_k3_s_bias_vanishes() -> None:
    """In proportion to the distance, relative to the gradient."""
    shares = []
    for distance in (0.1, 0.05):
        logits, logp = near(distance)
        true = reverse_gradient(logits, REFERENCE)
        shares.append(((expected_gradient("k3", logits, logp, weighted=False) - true).norm() / true.norm()).item())
    assert shares[0] / shares[1] == pytest.approx(2, rel=0.1)
    assert shares[0] < 0.1


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6).filter(lambda tilts: max(tilts) - min(tilts) > 0.1))
def test_near_the_reference_both_penalise_drift(tilts: list[float]) -> None:
    """Contract 12: a step down the expected gradient lowers KL(pi || ref)."""
    logits = REFERENCE + 0.5 * torch.tensor(tilts, dtype=torch.float64)
    true = reverse_gradient(logits, REFERENCE)
    for estimator in ("k2", "k3"):
        assert torch.dot(expected_gradient(estimator, logits, logits.log_softmax(-1), weighted=False), true) > 0


def test_far_from_the_reference_k3_without_weights_can_raise_the_kl() -> None:
    """A token that the policy has given up pulls it so hard that one it has taken up is let go on."""
    logits, reference = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.83, 0.005, 0.165], [0.28, 0.71, 0.01]))
    found = expected_gradient("k3", logits, logits, weighted=False, reference=reference)
    close(found, forward_gradient(logits, reference))
    before, after = (divergence((logits - step * found).log_softmax(-1), reference) for step in (0.0, 0.01))
    assert after > before
    weighted = expected_gradient("k3", logits, logits, weighted=True, reference=reference)
    assert divergence((logits - 0.01 * weighted).log_softmax(-1), reference) < before


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("sampler", [LOGP, OLD], ids=["on policy", "off policy"])
def test_with_weights_both_gradients_are_the_kl_s(estimator: Estimator, sampler: Tensor) -> None:
    close(expected_gradient(estimator, LOGITS, sampler, weighted=True), TRUE)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_off_policy_without_weights_neither_is(estimator: Estimator) -> None:
    assert (expected_gradient(estimator, LOGITS, OLD, weighted=False) - TRUE).norm() > 0.1 * TRUE.norm()


def test_k1_has_no_gradient_as_a_loss() -> None:
    """Why it is refused: a penalty of log pi itself pushes nowhere on average."""
    logp = LOGP.clone().requires_grad_()
    [by_logp] = torch.autograd.grad(kl(logp, REFERENCE, "k1").sum(), logp)
    torch.testing.assert_close(by_logits(LOGP.exp() * by_logp, LOGP), torch.zeros(6, dtype=torch.float64))


def reward_descent(estimator: Estimator, logits: Tensor) -> Tensor:
    """The gradient by the logits of the expected policy loss, with the penalty as the reward: E[penalty grad log pi]."""
    logp, ones = logits.log_softmax(-1).requires_grad_(), torch.ones(6, 1)
    old = logp.detach()
    rewards = shape_rewards(torch.zeros(6), logp[:, None], REFERENCE[:, None], ones, 1.0, estimator)
    loss = policy_loss(logp[:, None], old[:, None], rewards, ones, aggregate="constant", total=1)
    [by_logp] = torch.autograd.grad(loss, logp)
    return by_logits(old.exp() * by_logp, logp)


def test_k1_in_the_reward_is_the_gradient_of_the_kl() -> None:
    close(reward_descent("k1", LOGITS), TRUE)


def test_k3_in_the_reward_is_a_difference_of_two_kls() -> None:
    """Why only k1 penalises drift in the reward: k3's own dependence on the policy is lost there, and what is left is
    grad KL(pi || ref) - grad KL(ref || pi), in which the leading terms cancel."""
    close(reward_descent("k3", LOGITS), TRUE - forward_gradient(LOGITS, REFERENCE))


def test_k2_and_k3_in_the_reward_can_push_away_from_the_reference() -> None:
    logits, _ = near(0.3)
    true = reverse_gradient(logits, REFERENCE)
    assert torch.dot(reward_descent("k1", logits), true) > 0
    assert torch.dot(reward_descent("k3", logits), true) < 0
    assert torch.dot(reward_descent("k2", logits), true) < 0
