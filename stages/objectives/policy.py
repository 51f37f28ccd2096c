"""Policy objectives: the clipped surrogate, the KL-penalised one, entropy, and the per-token reward of RLHF.

Legend: B sequences, T tokens, V vocabulary. Losses are to be minimised.
"""

from __future__ import annotations

import torch

from stages.objectives.aggregate import Aggregate, aggregate_tokens, inside
from stages.objectives.kl import Estimator, kl


def policy_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: Aggregate = "sequence",
    total: float | None = None,
) -> torch.Tensor:
    """PPO's clipped surrogate (rl4llm eq. 10, 81, 82), negated: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    For A > 0 the gain is flat once r > 1 + clip_high; for A < 0 the push stops once r < 1 - clip_low, and has no bound
    above. `aggregate` and `total` as in `objectives/aggregate.py`.
    """
    ratio_BT, advantages_BT = _ratio(logp_BT, old_logp_BT, mask_BT).exp(), inside(advantages_BT, mask_BT)
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return aggregate_tokens(-torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT), mask_BT, aggregate, total)


def kl_penalty_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    coefficient: float,
    total: float | None = None,
) -> torch.Tensor:
    """The surrogate with a penalty on the KL to the old policy (rl4llm eq. 29, 31), negated: -(r A - coefficient KL[old, pi]).

    The KL is estimated at the tokens that the old policy sampled by r - 1 - log r, whose expectation under the old policy is
    KL(old || pi) and whose gradient, (r - 1) grad log pi, is that of it. A coefficient of 0 is eq. 30: no trust region.
    Mean over tokens, or sum over `total`.
    """
    log_ratio_BT = _ratio(logp_BT, old_logp_BT, mask_BT)
    gain_BT = log_ratio_BT.exp() * inside(advantages_BT, mask_BT)
    penalty_BT = coefficient * (torch.expm1(log_ratio_BT) - log_ratio_BT)
    return aggregate_tokens(penalty_BT - gain_BT, mask_BT, "token", total)


@torch.no_grad()
def policy_metrics(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> dict[str, torch.Tensor]:
    """How far the policy went, over the masked tokens: `clip_fraction` (share whose gradient the clip stops), `ratio_max`,
    `old_policy_kl` (of KL(old || policy), nats a token)."""
    log_ratio_BT, advantages_BT = _ratio(logp_BT, old_logp_BT, mask_BT), inside(advantages_BT, mask_BT)
    ratio_BT, count = log_ratio_BT.exp(), mask_BT.sum().clamp(min=1)
    stopped_BT = ((ratio_BT > 1 + clip_high) & (advantages_BT > 0)) | ((ratio_BT < 1 - clip_low) & (advantages_BT < 0))
    return {
        "clip_fraction": stopped_BT.sum() / count,
        "ratio_max": torch.where(mask_BT.bool(), ratio_BT, 0.0).max(),
        "old_policy_kl": (torch.expm1(log_ratio_BT) - log_ratio_BT).sum() / count,
    }


def entropy_BT(logits_BTV: torch.Tensor) -> torch.Tensor:  # noqa: N802 - named by its shape
    """Entropy of each token's distribution in nats (the S of rl4llm eq. 33), float32, differentiable; -inf logits count 0."""
    logp_BTV = logits_BTV.float().log_softmax(-1)
    finite_BTV = torch.where(logp_BTV.isfinite(), logp_BTV, 0.0)
    return -(logp_BTV.exp() * finite_BTV).sum(-1)


def shape_rewards(
    scores_B: torch.Tensor,
    logp_BT: torch.Tensor,
    ref_logp_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    beta: float,
    estimator: Estimator = "k1",
) -> torch.Tensor:
    """RLHF's reward a token (rl4llm eq. 7): -beta KL(policy || reference) at every token, the score added at the last one.

    Only k1 has, in the reward, the gradient of the KL. k2 and k3 lose theirs there: what is left of k3 is the gradient of
    KL(pi || ref) - KL(ref || pi), whose leading terms cancel and whose sign can be wrong. Use them as a loss (`kl_loss`).

    Returns rewards_BT, float32, 0 outside the mask; no gradient. A sequence without a token gets nothing.
    """
    with torch.no_grad():
        inside_BT = mask_BT.bool()
        rewards_BT = torch.where(inside_BT, -beta * kl(logp_BT, ref_logp_BT, estimator), 0.0)
        positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = torch.where(inside_BT, positions_T, -1).max(dim=-1).values
        rows = (last_B >= 0).nonzero().squeeze(-1)
        rewards_BT[rows, last_B[rows]] += scores_B.float()[rows]
        return rewards_BT


def _ratio(logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """log(pi / old), 0 outside the mask."""
    return inside(logp_BT.float() - old_logp_BT.float(), mask_BT)
