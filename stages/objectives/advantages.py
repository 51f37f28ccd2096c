"""Advantages: how much better a token was than the critic expected. Legend: B sequences, T tokens."""

from __future__ import annotations

import torch


def gae(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (rl4llm eq. 25, computed backwards by 28) and returns A + V_old (eq. 12).

    Tokens outside the mask are passed over, wherever they are: the token before them is followed by the next one inside.
    `bootstrap_B` is the value after the last token of a truncated sequence; a terminated one has 0, the default.

    Returns float32 (advantages_BT, returns_BT), both 0 outside the mask; NaN there does not leak. No gradient flows.
    """
    with torch.no_grad():
        rewards_BT, values_BT, inside_BT = rewards_BT.float(), values_BT.float(), mask_BT.bool()
        advantages_BT = torch.zeros_like(rewards_BT)
        after_B = torch.zeros_like(rewards_BT[:, 0])
        next_value_B = after_B if bootstrap_B is None else bootstrap_B.float()
        for t in reversed(range(rewards_BT.shape[1])):
            delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
            after_B = torch.where(inside_BT[:, t], delta_B + gamma * lam * after_B, after_B)
            next_value_B = torch.where(inside_BT[:, t], values_BT[:, t], next_value_B)
            advantages_BT[:, t] = torch.where(inside_BT[:, t], after_B, 0.0)
        return advantages_BT, torch.where(inside_BT, advantages_BT + values_BT, 0.0)


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor, shift_mean: bool = True, eps: float = 1e-8) -> torch.Tensor:
    """Scale to unit variance (and zero mean) over the masked tokens; 0 outside. Without spread the deviations stay 0.

    With `shift_mean=False` the mean stays where it was, as for rewards, whose sign has a meaning.
    """
    inside_BT = mask_BT.bool()
    count = inside_BT.sum().clamp(min=1)
    values_BT = torch.where(inside_BT, values_BT.float(), 0.0)
    mean = values_BT.sum() / count
    variance = torch.where(inside_BT, (values_BT - mean) ** 2, 0.0).sum() / count
    whitened_BT = (values_BT - mean) * torch.rsqrt(variance + eps)
    return torch.where(inside_BT, whitened_BT if shift_mean else whitened_BT + mean, 0.0)
