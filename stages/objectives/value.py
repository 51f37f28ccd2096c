"""The critic's objective. Legend: B sequences, T tokens."""

from __future__ import annotations

import torch

from stages.objectives.aggregate import aggregate_tokens, inside


def value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip: float | None = None,
    total: float | None = None,
) -> torch.Tensor:
    """Half the mean squared error to the fixed returns A + V_old (rl4llm eq. 12).

    With `clip`, the larger of the error and that of the value held within `clip` of the old one (PPO's value clipping).
    `total` is the global count of tokens; None counts this batch.
    """
    values_BT, old_values_BT, returns_BT = (inside(x_BT, mask_BT) for x_BT in (values_BT, old_values_BT, returns_BT))
    error_BT = (values_BT - returns_BT) ** 2
    if clip is not None:
        held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (held_BT - returns_BT) ** 2)
    return 0.5 * aggregate_tokens(error_BT, mask_BT, "token", total)


@torch.no_grad()
def explained_variance(values_BT: torch.Tensor, returns_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """1 - Var[R - V] / Var[R] over the masked tokens: 1 is a perfect critic, 0 one that knows the mean. 0 without spread."""
    values_BT, returns_BT = inside(values_BT, mask_BT), inside(returns_BT, mask_BT)
    spread = _variance(returns_BT, mask_BT)
    unexplained = _variance(returns_BT - values_BT, mask_BT)
    return torch.where(spread > 0, 1 - unexplained / spread.clamp(min=1e-12), torch.zeros_like(spread))


def _variance(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    count = mask_BT.sum().clamp(min=1)
    mean = inside(values_BT, mask_BT).sum() / count
    return inside((values_BT - mean) ** 2, mask_BT).sum() / count
