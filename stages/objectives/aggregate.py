"""How token losses become one number. Legend: B sequences, T tokens."""

from __future__ import annotations

from typing import Literal

import torch

Aggregate = Literal["sequence", "token", "constant"]


def aggregate_tokens(
    losses_BT: torch.Tensor, mask_BT: torch.Tensor, how: Aggregate, total: float | None = None
) -> torch.Tensor:
    """`sequence`: mean over each sequence's tokens, then over sequences (GRPO, eq. 82). `token`: mean over all tokens (DAPO).
    `constant`: the sum divided by `total` (Dr. GRPO).

    `total` is the global count over micro-batches and ranks: of sequences that have a token, of tokens, or the constant;
    None counts this batch. Values outside the mask, NaN included, enter neither the value nor the gradient.
    """
    inside_BT = mask_BT.bool()
    losses_BT = torch.where(inside_BT, losses_BT, 0.0)
    if how == "sequence":
        lengths_B = inside_BT.sum(-1)
        count = (lengths_B > 0).sum().clamp(min=1) if total is None else total
        return (losses_BT.sum(-1) / lengths_B.clamp(min=1)).sum() / count
    if how == "token":
        return losses_BT.sum() / (inside_BT.sum().clamp(min=1) if total is None else total)
    if how == "constant":
        if total is None:
            raise ValueError('aggregate "constant" needs `total`, the constant to divide by')
        return losses_BT.sum() / total
    raise ValueError(f"aggregate must be sequence, token or constant, not {how!r}")


def inside(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The values as float32, 0 outside the mask: what was there, NaN included, leaks neither forwards nor backwards."""
    return torch.where(mask_BT.bool(), values_BT.float(), 0.0)
