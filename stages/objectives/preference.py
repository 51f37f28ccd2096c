"""Objectives that learn from which of several completions is better.

Legend: B pairs (KTO: completions), K segments of a completion, G completions of one prompt. `pc`, `pr` are the policy's
log-probs of the chosen and the rejected completions, `rc`, `rr` the reference's; `p`, `r` the two models' of a completion that
may be either. Shape B, in nats, summed over a completion's tokens, or, where it says so, their means a token.

Every loss is to be minimised and comes as losses_B (a ranked group's as their sum), float32 whatever the inputs' type. A
coefficient out of its range, such as beta <= 0, raises ValueError. What else TRL's DPOTrainer knows is in
`preference_variants.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from stages.objectives.aggregate import inside


def implicit_reward(p: torch.Tensor, r: torch.Tensor, beta: float) -> torch.Tensor:
    """rewards_B = beta log(pi / ref) (rl4llm eq. 45), float32, up to beta log Z(x), which all completions of a prompt share."""
    return _positive("beta", beta) * (p.float() - r.float())


def dpo(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(m), m = beta log(pi/ref)(chosen) - beta log(pi/ref)(rejected) (rl4llm eq. 46; its gradient is eq. 47).

    `label_smoothing` > 0 is conservative DPO (cDPO, Mitchell 2023): labels are wrong with that chance, so that the loss is
    least at a finite margin. Curry-DPO (80) is this with the last stage's policy as the reference: its printed parenthesis is
    misplaced, beta and the sigmoid hold both ratios.
    """
    return _logistic(implicit_reward(pc, rc, beta) - implicit_reward(pr, rr, beta), label_smoothing)


def robust_dpo(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """DPO whose expectation over labels flipped with chance e is DPO's on clean ones (arXiv 2403.00409):
    ((1 - e) dpo(chosen, rejected) - e dpo(rejected, chosen)) / (1 - 2e). It has no lower bound for e > 0."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing, the chance that a label is wrong, must be in [0, 0.5), it is {label_smoothing}")
    right_B, flipped_B = dpo(pc, pr, rc, rr, beta), dpo(pr, pc, rr, rc, beta)
    return ((1 - label_smoothing) * right_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


def length_normalised_dpo(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO on per-token means (Tulu 3, arXiv 2411.15124; TRL's sigmoid_norm): a long completion weighs no more than a
    short one. It wants a larger beta than DPO, by about a completion's length."""
    return dpo(pc, pr, rc, rr, beta, label_smoothing)


def dpo_nll(
    pc: torch.Tensor,
    pr: torch.Tensor,
    rc: torch.Tensor,
    rr: torch.Tensor,
    beta: float,
    nll_coefficient: float,
    nll_B: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """DPO + coefficient x NLL of the chosen (RPO, arXiv 2404.19733), which keeps the chosen's likelihood from falling.

    There `nll_B` is the mean a token of each completion; TRL's is the mean over all tokens of the batch.
    """
    return dpo(pc, pr, rc, rr, beta, label_smoothing) + _nll(nll_coefficient, nll_B)


def spin(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """SPIN (arXiv 2401.01335, eq. 4.7 with the logistic loss, its lambda as beta): DPO's loss, where the chosen is the
    demonstration, the rejected a sample of the last iteration's policy, and the reference that policy."""
    return dpo(pc, pr, rc, rr, beta)


def ipo(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, tau: float) -> torch.Tensor:
    """(h - 1/(2 tau))^2, h = log(pi/ref)(chosen) - log(pi/ref)(rejected) (rl4llm eq. 68): no push once h is at 1/(2 tau).

    On per-token means, as TRL and, so it says, the paper's own experiments; given sums it is the equation to the letter.
    """
    return (pc.float() - rc.float() - (pr.float() - rr.float()) - 0.5 / _positive("tau", tau)) ** 2


def reference_free_dpo(pc: torch.Tensor, pr: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (log pi(chosen) - log pi(rejected))) (`worked-examples.txt` 3; rl4llm eq. 75): DPO with a uniform
    reference, and an upper bound of DPO with a perfect one but for a constant (5.3.2)."""
    return _logistic(_positive("beta", beta) * (pc.float() - pr.float()), label_smoothing)


def cpo(
    pc: torch.Tensor,
    pr: torch.Tensor,
    beta: float,
    nll_coefficient: float,
    nll_B: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`reference_free_dpo` + coefficient x NLL of the chosen (rl4llm eq. 75-76).

    In eq. 76 the NLL is a completion's sum, -pc, and the coefficient 1; TRL's is the mean over all tokens of the batch.
    """
    return reference_free_dpo(pc, pr, beta, label_smoothing) + _nll(nll_coefficient, nll_B)


def simpo(pc: torch.Tensor, pr: torch.Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(beta (pc - pr) - gamma) on per-token means, without a reference (arXiv 2405.14734, eq. 6).

    `gamma` is the margin to reach, in units of beta x nats a token (TRL's simpo_gamma; the paper's gamma, not its gamma/beta).
    """
    return _logistic(_positive("beta", beta) * (pc.float() - pr.float()) - gamma, label_smoothing)


def orpo(pc: torch.Tensor, pr: torch.Tensor, beta: float) -> torch.Tensor:
    """-pc - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) (arXiv 2403.07691, eq. 4-7).

    On per-token means, so that -pc is the NLL of the chosen that ORPO is trained on, with the coefficient 1. TRL's NLL differs:
    the mean over all tokens of the batch, those of the prompts included. `beta` is the paper's lambda.
    """
    ratio_B = F.logsigmoid(_log_odds(pc.float()) - _log_odds(pr.float()))
    return -pc.float() - _positive("beta", beta) * ratio_B


def kto(
    p: torch.Tensor,
    r: torch.Tensor,
    desirable: torch.Tensor,
    z: torch.Tensor | float,
    beta: float,
    w_desirable: float = 1.0,
    w_undesirable: float = 1.0,
) -> torch.Tensor:
    """w (1 - sigmoid(+-(beta log(pi/ref) - z))), + where `desirable` is 1, - where it is 0 (rl4llm eq. 69-73).

    `z` is the reference point of eq. 71, in units of the reward: beta x KL, from `kto_reference_point`. With z = 0 it is the
    unpaired form of APO-zero (TRL's apo_zero_unpaired).
    """
    weights = _positive("w_desirable", w_desirable), _positive("w_undesirable", w_undesirable)
    desirable_B = desirable.bool()
    gain_B = implicit_reward(p, r, beta) - z
    return torch.where(desirable_B, *weights) * torch.sigmoid(torch.where(desirable_B, -gain_B, gain_B))


@torch.no_grad()
def kto_reference_point(p: torch.Tensor, r: torch.Tensor, beta: float) -> torch.Tensor:
    """z = max(0, mean of beta log(pi/ref)) over mismatched pairs: each prompt with the completion of another one of its batch
    (rl4llm eq. 71 by the batch estimate of arXiv 2402.01306). A scalar, float32; no gradient.

    It is one number for all that one optimiser step sees: compute it before the batch is divided. A batch of one has no
    mismatched pair.
    """
    if not p.numel():
        raise ValueError("the reference point of KTO needs a mismatched pair, there is none: it takes a batch of two or more")
    return implicit_reward(p, r, beta).mean().clamp(min=0.0)


class KtoWeights(NamedTuple):
    """`inside`: whether w_desirable n_desirable / (w_undesirable n_undesirable) is in [1, 3/2] (rl4llm eq. 74). `w_desirable`,
    `w_undesirable`: the range that one weight may have while the other stays as it is."""

    inside: bool
    w_desirable: tuple[float, float]
    w_undesirable: tuple[float, float]


def kto_weights(n_desirable: int, n_undesirable: int, w_desirable: float = 1.0, w_undesirable: float = 1.0) -> KtoWeights:
    """Whether KTO's weights fit the numbers of completions (rl4llm eq. 74), and which would. TRL's upper end is 1.33.

    Raises ValueError where a class has no completion, or a weight is not above 0.
    """
    if n_desirable < 1 or n_undesirable < 1:
        raise ValueError(
            f"KTO needs completions of both classes, there are {n_desirable} desirable and {n_undesirable} undesirable"
        )
    desirable = n_desirable * _positive("w_desirable", w_desirable)
    undesirable = n_undesirable * _positive("w_undesirable", w_undesirable)
    ratio, rounding = desirable / undesirable, 1e-9
    return KtoWeights(
        inside=1 - rounding <= ratio <= 1.5 + rounding,
        w_desirable=(undesirable / n_desirable, 1.5 * undesirable / n_desirable),
        w_undesirable=(desirable / n_undesirable / 1.5, desirable / n_undesirable),
    )


def two_d_dpo(
    pc_BK: torch.Tensor,
    pr_BK: torch.Tensor,
    rc_BK: torch.Tensor,
    rr_BK: torch.Tensor,
    wc_BK: torch.Tensor,
    wr_BK: torch.Tensor,
    beta: float,
    mask_BK: torch.Tensor,
) -> torch.Tensor:
    """Sum over pairs of segments of -log sigmoid(beta (wc log(pi/ref)(chosen k) - wr log(pi/ref)(rejected k))) (rl4llm eq. 79).

    Log-probs are summed over each segment's tokens, `wc`, `wr` are the segments' scores over all aspects. What is outside the
    mask, NaN included, enters neither the value nor the gradient; a row without a pair of segments gives 0.
    """
    pc_BK, pr_BK, rc_BK, rr_BK, wc_BK, wr_BK = (inside(x_BK, mask_BK) for x_BK in (pc_BK, pr_BK, rc_BK, rr_BK, wc_BK, wr_BK))
    margin_BK = wc_BK * implicit_reward(pc_BK, rc_BK, beta) - wr_BK * implicit_reward(pr_BK, rr_BK, beta)
    return inside(-F.logsigmoid(margin_BK), mask_BK).sum(-1)


def ranked_group(logp_G: torch.Tensor, ranks_G: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over a group's ordered pairs of -log sigmoid(beta (log pi(better) - log pi(worse))) (`worked-examples.txt` 4).

    `logp_G` are summed log-probs of whole completions; rank 1 is best, ties make no pair. There is no reference and no ratio:
    it is not GRPO's objective (rl4llm 82), though its source calls it so. Without an ordered pair: 0.
    """
    margins_GG = _positive("beta", beta) * (logp_G.float()[:, None] - logp_G.float()[None, :])
    better_GG = ranks_G[:, None] < ranks_G[None, :]
    return torch.where(better_GG, -F.logsigmoid(margins_GG), 0.0).sum()


def _logistic(margin_B: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log sigmoid(margin), mixed with that of the flipped label."""
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing, the chance that a label is wrong, must be in [0, 0.5], it is {label_smoothing}")
    return -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)


def _log_odds(mean_B: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p. The odds of a sure completion are infinite: log p is held a little below 0."""
    mean_B = mean_B.clamp(max=-1e-6)
    return mean_B - torch.log(-torch.expm1(mean_B))


def _nll(coefficient: float, nll_B: torch.Tensor) -> torch.Tensor:
    if not (coefficient >= 0 and math.isfinite(coefficient)):
        raise ValueError(f"nll_coefficient must not be below 0, it is {coefficient}")
    return coefficient * nll_B.float()


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a number above 0, it is {value}")
    return value
