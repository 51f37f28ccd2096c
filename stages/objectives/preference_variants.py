"""Further losses on preference pairs, as TRL's DPOTrainer has them. Legend, units and errors as in `preference.py`.

All are on summed log-probs and need a reference. They are written in the implicit rewards c = beta log(pi/ref)(chosen) and
r = beta log(pi/ref)(rejected).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from stages.objectives.preference import implicit_reward


def hinge(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """max(0, 1 - (c - r)): SLiC's loss normalised by the reference (RSO, arXiv 2309.06657, hinge-norm); nothing beyond 1."""
    return torch.relu(1 - (implicit_reward(pc, rc, beta) - implicit_reward(pr, rr, beta)))


def exo(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, label_smoothing: float = 1e-3
) -> torch.Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL(q || p) of q = softmax(c, r) from the labels p = (1 - e, e), e `label_smoothing` > 0.

    DPO with label smoothing is the other direction, KL(p || q), but for a constant.
    """
    if not 0 < label_smoothing <= 0.5:
        raise ValueError(f"EXO's label_smoothing must be in (0, 0.5], it is {label_smoothing}: its log is in the loss")
    margin_B = implicit_reward(pc, rc, beta) - implicit_reward(pr, rr, beta)
    chosen_B = torch.sigmoid(margin_B) * (F.logsigmoid(margin_B) - math.log1p(-label_smoothing))
    rejected_B = torch.sigmoid(-margin_B) * (F.logsigmoid(-margin_B) - math.log(label_smoothing))
    return chosen_B + rejected_B


def nca(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(c) - 1/2 log sigmoid(-c) - 1/2 log sigmoid(-r) (NCA, arXiv 2402.05369): it keeps the chosen from falling."""
    chosen_B, rejected_B = implicit_reward(pc, rc, beta), implicit_reward(pr, rr, beta)
    return -F.logsigmoid(chosen_B) - 0.5 * (F.logsigmoid(-chosen_B) + F.logsigmoid(-rejected_B))


def bco(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(c) - log sigmoid(-r): each completion is classified by itself (BCO, arXiv 2404.04656, without its running
    mean of rewards, as TRL's bco_pair)."""
    return -F.logsigmoid(implicit_reward(pc, rc, beta)) - F.logsigmoid(-implicit_reward(pr, rr, beta))


def sppo(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """((c - 1/2)^2 + (r + 1/2)^2) / beta^2 (SPPO, arXiv 2405.00675, eq. 4.7 with win rates of 1 and 0; its eta is 1/beta)."""
    chosen_B, rejected_B = implicit_reward(pc, rc, beta), implicit_reward(pr, rr, beta)
    return ((chosen_B - 0.5) ** 2 + (rejected_B + 0.5) ** 2) / beta**2


def apo_zero(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(-c) + sigmoid(r) (APO, arXiv 2408.06266, eq. 7): for chosen completions better than the policy's own."""
    return torch.sigmoid(-implicit_reward(pc, rc, beta)) + torch.sigmoid(implicit_reward(pr, rr, beta))


def apo_down(pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(c) + sigmoid(r - c) (APO, eq. 8): for chosen completions worse than the policy's own; both fall."""
    chosen_B, rejected_B = implicit_reward(pc, rc, beta), implicit_reward(pr, rr, beta)
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


def discopop(
    pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor, beta: float, discopop_tau: float = 0.05
) -> torch.Tensor:
    """(1 - s) (-log sigmoid(m)) + s exp(-m), m = c - r, s = sigmoid(m / tau) (DiscoPOP, arXiv 2406.08414, eq. 5).

    `discopop_tau` is at most 1: beyond, the exponential wins at negative margins.
    """
    if not 0 < discopop_tau <= 1:
        raise ValueError(f"discopop_tau must be in (0, 1], it is {discopop_tau}")
    margin_B = implicit_reward(pc, rc, beta) - implicit_reward(pr, rr, beta)
    # In one exponential: apart, they are 0 x infinity at large negative margins.
    exponential_B = torch.exp(F.logsigmoid(margin_B / discopop_tau) - margin_B)
    return torch.sigmoid(-margin_B / discopop_tau) * -F.logsigmoid(margin_B) + exponential_B
