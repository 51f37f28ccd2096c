"""KL of whole sequences: of the product rule's two terms a loss keeps that of each token, k1 in the reward keeps both.

The policy writes two tokens, the second by the first one's; all V x V sequences are enumerated.
"""

from __future__ import annotations

import pytest
import torch
from categoricals import close, divergence
from torch import Tensor

from stages.objectives.advantages import gae
from stages.objectives.kl import Estimator, kl_loss
from stages.objectives.policy import policy_loss, shape_rewards

V = 4
FIRST, SECOND = (tokens_N.flatten() for tokens_N in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
MASK_BT = torch.ones(V * V, 2)


def logits_of(seed: int) -> Tensor:
    """Of the first token (row 0) and of the second after each first one."""
    return torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logp_of(logits: Tensor) -> Tensor:
    """logp_BT of every sequence."""
    logp = logits.log_softmax(-1)
    return torch.stack([logp[0, FIRST], logp[1 + FIRST, SECOND]], dim=1)


LOGITS, REFERENCE, OLD = logits_of(0), logits_of(1).log_softmax(-1), logits_of(2).log_softmax(-1)
REFERENCE_BT, OLD_BT = logp_of(REFERENCE), logp_of(OLD)


def gradient_of(loss_of_tokens: Tensor, logp_BT: Tensor, logits: Tensor, sampler_BT: Tensor) -> Tensor:
    """By the logits, of the expectation over the sampler's sequences of a loss that is a sum over tokens."""
    [by_logp_BT] = torch.autograd.grad(loss_of_tokens, logp_BT, retain_graph=True)
    return torch.autograd.grad((sampler_BT.sum(1).exp()[:, None] * by_logp_BT * logp_BT).sum(), logits)[0]


def true_gradient(prefixes_V: Tensor | None) -> Tensor:
    """Of KL(first) + E over first tokens of KL(second | first). With given probabilities of the first tokens, these are held
    fixed: the second term of the product rule, grad of the prefixes' own distribution, is left out."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    prefixes_V = logp[0].exp() if prefixes_V is None else prefixes_V
    whole = divergence(logp[0], REFERENCE[0]) + (prefixes_V * divergence(logp[1:], REFERENCE[1:])).sum()
    return torch.autograd.grad(whole, logits)[0]


@pytest.mark.parametrize(
    ("estimator", "on_policy", "weighted"), [("k2", True, False), ("k2", False, True), ("k3", True, True), ("k3", False, True)]
)
def test_a_loss_has_each_token_s_kl_after_the_prefixes_that_were_sampled(
    estimator: Estimator, on_policy: bool, weighted: bool
) -> None:
    logits = LOGITS.clone().requires_grad_()
    logp_BT = logp_of(logits)
    sampler = LOGITS.log_softmax(-1) if on_policy else OLD
    loss = kl_loss(logp_BT, REFERENCE_BT, MASK_BT, estimator, logp_of(sampler) if weighted else None, "constant", 1)
    found = gradient_of(loss, logp_BT, logits, logp_of(sampler))
    close(found, true_gradient(sampler[0].exp()))
    assert (found - true_gradient(None))[0].norm() > 0.1 * true_gradient(None)[0].norm(), "the prefixes' share is left out"


def test_k1_in_the_reward_has_the_kl_of_the_whole_sequence() -> None:
    """Undiscounted returns: a token pays for the KL of all that it leads to."""
    logits = LOGITS.clone().requires_grad_()
    logp_BT = logp_of(logits)
    rewards_BT = shape_rewards(torch.zeros(V * V), logp_BT, REFERENCE_BT, MASK_BT, 1.0)
    advantages_BT, _ = gae(rewards_BT, torch.zeros(V * V, 2), MASK_BT, 1.0, 1.0)
    loss = policy_loss(logp_BT, logp_BT.detach(), advantages_BT, MASK_BT, aggregate="constant", total=1)
    found = gradient_of(loss, logp_BT, logits, logp_BT.detach())
    close(found, true_gradient(None))
