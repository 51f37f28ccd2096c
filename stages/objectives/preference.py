"""Objectives that learn from which of several completions is better. Legend: G completions of one prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ranked_group(logp_G: torch.Tensor, ranks_G: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over a group's ordered pairs of -log sigmoid(beta (log pi(better) - log pi(worse))) (`worked-examples.txt` 4).

    `logp_G` are summed log-probs of whole completions; rank 1 is best, ties make no pair. There is no reference and no ratio:
    it is not GRPO's objective (rl4llm 82), though its source calls it so. Without an ordered pair: 0.
    """
    margins_GG = beta * (logp_G.float()[:, None] - logp_G.float()[None, :])
    better_GG = ranks_G[:, None] < ranks_G[None, :]
    return torch.where(better_GG, -F.logsigmoid(margins_GG), 0.0).sum()
