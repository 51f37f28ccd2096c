"""Estimators of KL(policy || reference) from sampled tokens, as a reward term or as a loss (rl4llm 6.4; Schulman 2020)."""

from __future__ import annotations

from typing import Literal

import torch

from stages.objectives.aggregate import Aggregate, aggregate_tokens, inside

Estimator = Literal["k1", "k2", "k3"]


def kl(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Elementwise estimate of KL(policy || reference) at tokens sampled from the policy, in nats.

    k1: log(pi/ref), unbiased, any sign. k2: half its square, biased by the third order of the distance, never negative. k3:
    ref/pi - 1 - log(ref/pi), unbiased, never negative; it varies less than k1 as long as no token has ref/pi >= 2, and more,
    without bound, where the policy has given up a token that the reference has not.
    """
    difference = logp.float() - ref_logp.float()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"the KL estimator must be k1, k2 or k3, not {estimator!r}")


def kl_loss(
    logp_BT: torch.Tensor,
    ref_logp_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    estimator: Estimator,
    old_logp_BT: torch.Tensor | None = None,
    aggregation: Aggregate = "token",
    total: float | None = None,
) -> torch.Tensor:
    """A KL penalty whose gradient pulls the policy towards the reference: a mean over tokens as in `objectives/aggregate.py`.

    k1 is refused (ValueError): as a loss its gradient is that of log pi, whose expectation is 0, so it penalises nothing.

    Without `old_logp_BT` the tokens are the policy's own. k2's gradient, log(pi/ref) grad log pi, has the expectation
    grad KL(pi || ref). That of k3, (1 - ref/pi) grad log pi, has grad KL(ref || pi): this bias vanishes near the reference, but
    far from it a step can even raise KL(pi || ref).

    With `old_logp_BT`, the tokens were sampled from that older policy and each is weighted by pi/old. For k3 the weight carries
    gradient, for k2 it does not: both then have (pi/old) log(pi/ref) grad log pi, whose expectation is grad KL(pi || ref).

    All this is of each token after its prefix, as it was sampled: that the policy could avoid the prefix is no part of the
    gradient. Only k1 in the reward (`shape_rewards`) with undiscounted returns has the KL of whole sequences.
    """
    if estimator == "k1":
        raise ValueError("k1 cannot be a loss: its gradient is 0 in expectation; use k2 or k3, or put k1 into the reward")
    # Masked here already: a NaN outside the mask would come back through the gradients of the exponentials.
    logp_BT = inside(logp_BT, mask_BT)
    penalty_BT = kl(logp_BT, ref_logp_BT, estimator)
    if old_logp_BT is not None:
        weight_BT = (logp_BT - old_logp_BT.float()).exp()
        penalty_BT = penalty_BT * (weight_BT if estimator == "k3" else weight_BT.detach())
    return aggregate_tokens(penalty_BT, mask_BT, aggregation, total)


class AdaptiveKL:
    """A penalty coefficient that follows a target KL (rl4llm eq. 32): halved below target / 1.5, doubled above target x 1.5."""

    def __init__(self, target: float, coefficient: float) -> None:
        if target <= 0 or coefficient <= 0:
            raise ValueError(f"target and coefficient must be positive, they are {target} and {coefficient}")
        self.target = target
        self.coefficient = coefficient

    def update(self, observed: float) -> float:
        """Adapt to the KL that was observed after an update; return the new coefficient."""
        if observed < self.target / 1.5:
            self.coefficient /= 2
        elif observed > self.target * 1.5:
            self.coefficient *= 2
        return self.coefficient
