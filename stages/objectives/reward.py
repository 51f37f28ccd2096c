"""What a reward model learns from: pairs and rankings. Legend: B pairs, K completions of one prompt."""

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
