"""Small categoricals whose KLs, variances and gradients are finite sums, in float64: oracles of the KL estimators.

Legend: V vocabulary, T positions, each with a policy and a reference of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

V, T = 6, 3
# What the objectives compute is float32.
close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)


def normal(seed: int, spread: float) -> Tensor:
    return spread * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS_TV = normal(0, 0.8)
REFERENCE_TV = normal(1, 0.8).log_softmax(-1)
OLD_TV = (LOGITS_TV + normal(2, 0.4)).log_softmax(-1)


def divergence(logp_V: Tensor, other_V: Tensor) -> Tensor:
    """KL(p || other)."""
    return (logp_V.exp() * (logp_V - other_V)).sum(-1)


def reverse_gradient(logits_V: Tensor, ref_logp_V: Tensor) -> Tensor:
    """The gradient of KL(pi || ref) by the logits of pi: pi (log(pi/ref) - KL)."""
    logp_V = logits_V.log_softmax(-1)
    return logp_V.exp() * (logp_V - ref_logp_V - divergence(logp_V, ref_logp_V)[..., None])


def forward_gradient(logits_V: Tensor, ref_logp_V: Tensor) -> Tensor:
    """The gradient of KL(ref || pi) by the logits of pi: pi - ref."""
    return logits_V.softmax(-1) - ref_logp_V.exp()


def moments(logp_V: Tensor, values_V: Tensor) -> tuple[float, float]:
    """Mean and variance of a function of the token, under the policy."""
    mean = (logp_V.exp() * values_V).sum()
    return mean.item(), (logp_V.exp() * (values_V - mean) ** 2).sum().item()
