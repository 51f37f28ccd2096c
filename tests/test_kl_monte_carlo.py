"""KL estimators by Monte Carlo, as training uses them: sampled tokens, a mask, means over tokens or sequences (rl4llm 6.4).

Each position has a policy of its own, and sequences have unequal lengths, so that the two means differ. Every estimate is a
mean of independent draws, whose spread gives its standard error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from categoricals import LOGITS_TV, OLD_TV, REFERENCE_TV, T, divergence, forward_gradient, moments, reverse_gradient
from torch import Tensor

from stages.objectives.aggregate import Aggregate
from stages.objectives.kl import Estimator, kl, kl_loss
from stages.objectives.policy import policy_loss, shape_rewards

DRAWS, B, ERRORS = 40, 900, 5
LENGTHS_B = torch.arange(B) % T + 1
MASK_BT = torch.arange(T) < LENGTHS_B[:, None]
LOGP_TV = LOGITS_TV.log_softmax(-1)
# What each position weighs in the mean over tokens, and in the mean over sequences of their means.
WEIGHTS: dict[Aggregate, Tensor] = {
    "token": MASK_BT.double().sum(0) / MASK_BT.sum(),
    "sequence": (MASK_BT / LENGTHS_B[:, None]).double().mean(0),
}
REVERSE_TV, FORWARD_TV = reverse_gradient(LOGITS_TV, REFERENCE_TV), forward_gradient(LOGITS_TV, REFERENCE_TV)
KL_T = divergence(LOGP_TV, REFERENCE_TV)
HOW = pytest.mark.parametrize("how", list(WEIGHTS))


def estimate(sampler_TV: Tensor, of_tokens: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard error of something computed from tokens_BT of the sampler."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(DRAWS):
        tokens_BT = torch.multinomial(sampler_TV.exp(), B, replacement=True, generator=generator).T
        draws.append(of_tokens(tokens_BT).double())
    every = torch.stack(draws)
    return every.mean(0), every.std(0) / DRAWS**0.5


def at(tokens_BT: Tensor, logp_TV: Tensor) -> Tensor:
    """Log-probs of the tokens; outside the mask there is none."""
    return torch.where(MASK_BT, logp_TV[torch.arange(T), tokens_BT], torch.nan)


def agree(found: tuple[Tensor, Tensor], exact: Tensor) -> bool:
    """Whether an estimate is within its errors of the exact value; the errors must be small enough to tell."""
    mean, error = found
    assert error.norm() < 0.05 * exact.norm()
    return bool(((mean - exact).abs() <= ERRORS * error).all())


def gradient(estimator: Estimator, how: Aggregate, sampler_TV: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    """Of the loss by the logits."""
    logits_TV = LOGITS_TV.clone().requires_grad_()

    def of_tokens(tokens_BT: Tensor) -> Tensor:
        logp_BT = at(tokens_BT, logits_TV.log_softmax(-1))
        old_BT = at(tokens_BT, sampler_TV) if weighted else None
        loss = kl_loss(logp_BT, at(tokens_BT, REFERENCE_TV), MASK_BT, estimator, old_BT, how)
        return torch.autograd.grad(loss, logits_TV)[0]

    return estimate(sampler_TV, of_tokens)


@HOW
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Estimator, how: Aggregate) -> None:
    weights_BT = WEIGHTS[how] * MASK_BT / MASK_BT.sum(0)

    def of_tokens(tokens_BT: Tensor) -> Tensor:
        return (weights_BT * kl(LOGP_TV[torch.arange(T), tokens_BT], REFERENCE_TV[torch.arange(T), tokens_BT], estimator)).sum()

    assert agree(estimate(LOGP_TV, of_tokens), (WEIGHTS[how] * KL_T).sum())


@HOW
@pytest.mark.parametrize(("sampler_TV", "weighted"), [(LOGP_TV, False), (OLD_TV, True)], ids=["on policy", "off policy"])
def test_the_loss_s_value_is_the_kl_by_k3_and_not_by_k2(how: Aggregate, sampler_TV: Tensor, weighted: bool) -> None:
    true = (WEIGHTS[how] * KL_T).sum()
    of_k2_T = torch.tensor(
        [moments(logp_V, 0.5 * (logp_V - ref_V) ** 2)[0] for logp_V, ref_V in zip(LOGP_TV, REFERENCE_TV, strict=True)]
    )
    expected = {"k3": true, "k2": (WEIGHTS[how] * of_k2_T).sum()}
    for estimator in ("k2", "k3"):

        def of_tokens(tokens_BT: Tensor, estimator: Estimator = estimator) -> Tensor:
            old_BT = at(tokens_BT, sampler_TV) if weighted else None
            return kl_loss(at(tokens_BT, LOGP_TV), at(tokens_BT, REFERENCE_TV), MASK_BT, estimator, old_BT, how)

        found = estimate(sampler_TV, of_tokens)
        assert agree(found, expected[estimator])
        assert agree(found, true) == (estimator == "k3")


@HOW
def test_k2_s_gradient_on_policy_is_the_kl_s(how: Aggregate) -> None:
    assert agree(gradient("k2", how, LOGP_TV, weighted=False), WEIGHTS[how][:, None] * REVERSE_TV)


@HOW
def test_k3_s_gradient_on_policy_is_that_of_the_other_kl(how: Aggregate) -> None:
    found = gradient("k3", how, LOGP_TV, weighted=False)
    assert agree(found, WEIGHTS[how][:, None] * FORWARD_TV)
    assert not agree(found, WEIGHTS[how][:, None] * REVERSE_TV)


@HOW
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("sampler_TV", [LOGP_TV, OLD_TV], ids=["on policy", "off policy"])
def test_with_weights_both_gradients_are_the_kl_s(estimator: Estimator, how: Aggregate, sampler_TV: Tensor) -> None:
    assert agree(gradient(estimator, how, sampler_TV, weighted=True), WEIGHTS[how][:, None] * REVERSE_TV)


@HOW
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_off_policy_without_weights_neither_is(estimator: Estimator, how: Aggregate) -> None:
    assert not agree(gradient(estimator, how, OLD_TV, weighted=False), WEIGHTS[how][:, None] * REVERSE_TV)


@HOW
def test_k1_in_the_reward_has_the_kl_s_gradient(how: Aggregate) -> None:
    """Through the score function: each token's reward is its advantage, in the policy loss at a ratio of 1."""
    logits_TV = LOGITS_TV.clone().requires_grad_()

    def of_tokens(tokens_BT: Tensor) -> Tensor:
        logp_BT = at(tokens_BT, logits_TV.log_softmax(-1))
        rewards_BT = shape_rewards(torch.zeros(B), logp_BT, at(tokens_BT, REFERENCE_TV), MASK_BT, beta=1.0)
        loss = policy_loss(logp_BT, logp_BT.detach(), rewards_BT, MASK_BT, aggregate=how)
        return torch.autograd.grad(loss, logits_TV)[0]

    assert agree(estimate(LOGP_TV, of_tokens), WEIGHTS[how][:, None] * REVERSE_TV)


@pytest.mark.parametrize(("distance", "k3_is_steadier"), [(0.1, True), (1.0, None), (6.0, False)])
def test_the_spread_of_samples_is_the_exact_one(distance: float, k3_is_steadier: bool | None) -> None:
    """k3 of lower variance than k1 near the reference, not far from it."""
    ref_logp_V = REFERENCE_TV[0]
    logp_V = (ref_logp_V + distance * torch.tensor([1.0, 0.6, 0.2, -0.2, -0.6, -1.0])).log_softmax(-1)
    tokens_N = torch.multinomial(logp_V.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    spread = {}
    for estimator in ("k1", "k2", "k3"):
        values_V = kl(logp_V, ref_logp_V, estimator).double()
        mean, variance = moments(logp_V, values_V)
        _, spread_of_squares = moments(logp_V, (values_V - mean) ** 2)
        spread[estimator] = kl(logp_V[tokens_N], ref_logp_V[tokens_N], estimator).double().var().item()
        assert abs(spread[estimator] - variance) < ERRORS * (spread_of_squares / len(tokens_N)) ** 0.5
    if k3_is_steadier is not None:
        assert (spread["k3"] < spread["k1"]) == k3_is_steadier
