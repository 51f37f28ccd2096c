"""What a reward model learns from: pairs, rankings and labelled steps. B pairs, K completions of one prompt, N steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry(chosen_B: torch.Tensor, rejected_B: torch.Tensor, margin_B: torch.Tensor | None = None) -> torch.Tensor:
    """losses_B = -log sigmoid(r(chosen) - r(rejected) - margin) (rl4llm eq. 13, 38; margin: Llama 2, arXiv 2307.09288)."""
    difference_B = chosen_B.float() - rejected_B.float()
    return -F.logsigmoid(difference_B if margin_B is None else difference_B - margin_B.float())


def ranking(scores_K: torch.Tensor, ranks_K: torch.Tensor) -> torch.Tensor:
    """Mean Bradley-Terry loss over all ordered pairs of one prompt's completions; rank 1 is best, ties are left out.

    Each completion is scored once and enters all of its pairs: InstructGPT's batch element. Without an ordered pair: 0.
    """
    difference_KK = scores_K.float()[:, None] - scores_K.float()[None, :]
    better_KK = ranks_K[:, None] < ranks_K[None, :]
    losses_KK = -F.logsigmoid(difference_KK)
    return torch.where(better_KK, losses_KK, 0.0).sum() / better_KK.sum().clamp(min=1)


def step_loss(scores_N: torch.Tensor, labels_N: torch.Tensor, total: int | None = None) -> torch.Tensor:
    """Binary cross-entropy of steps' logits with their labels, 0 wrong to 1 right (Lightman et al., arXiv 2305.20050; with
    labels between: Math-Shepherd's soft estimation, arXiv 2312.08935).

    The sum divided by `total`, the labelled steps of the whole optimizer batch; by those given here when it is None. Without a
    step: 0, through which gradients still flow.
    """
    loss = F.binary_cross_entropy_with_logits(scores_N.float(), labels_N.float(), reduction="sum")
    return loss / max(1, len(labels_N) if total is None else total)
