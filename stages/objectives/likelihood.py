"""The likelihood of given tokens: SFT and language modelling."""

from __future__ import annotations

import torch


def nll_loss(logp_BT: torch.Tensor, mask_BT: torch.Tensor, total: float | None = None) -> torch.Tensor:
    """Mean negative log-likelihood over the masked tokens (rl4llm eq. 3), in nats a token.

    `total` is the number to divide by: the count over all micro-batches and ranks of the step; None counts this batch.
    Values outside the mask, NaN included, do not enter.
    """
    count = mask_BT.sum().clamp(min=1) if total is None else total
    return -logp_BT.masked_fill(mask_BT == 0, 0.0).sum() / count
