"""Advantages: how much better a token was than the critic expected, or a completion than others of its prompt.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

GroupScale = Literal["std", "none", "rloo"]


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


def group_advantages(
    rewards_B: torch.Tensor,
    groups_B: torch.Tensor,
    scale: GroupScale = "std",
    valid_B: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """advantages_B, float32: each reward against those of its group, the sequences with the same number in `groups_B`.

    `std`: (r - mean) / (std + eps), GRPO's (rl4llm 6.3), with the sample deviation (n - 1). `none`: r - mean (Dr. GRPO, arXiv
    2503.20783). `rloo`: r - mean of the others (arXiv 2402.14740). A sequence outside `valid_B`, which has no reward, enters
    no mean and gets 0. A group of one, or whose rewards are alike but for rounding (`spread_B`), gives 0.
    """
    with torch.no_grad():
        rewards_B, valid_B = _valid(rewards_B, valid_B)
        place_B, count_G = _groups(groups_B, valid_B)
        mean_B = _group_sum(rewards_B, place_B, len(count_G))[place_B] / count_G[place_B].clamp(min=1)
        deviation_B = torch.where(valid_B, rewards_B - mean_B, 0.0)
        others_B = (count_G[place_B] - 1).clamp(min=1)
        if scale == "std":
            variance_B = _group_sum(deviation_B**2, place_B, len(count_G))[place_B] / others_B
            deviation_B = deviation_B / (variance_B.sqrt() + eps)
        elif scale == "rloo":
            deviation_B = deviation_B * count_G[place_B] / others_B
        elif scale != "none":
            raise ValueError(f"scale must be std, none or rloo, not {scale!r}")
        return torch.where(spread_B(rewards_B, groups_B, valid_B, eps), deviation_B, 0.0).float()


def spread_B(  # noqa: N802 - named by its shape
    rewards_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """Which sequences have a reward and a group whose rewards differ by more than `eps`, relative to those above 1.

    Equal completions that were scored in batches of other shapes differ in their last bits: divided by a deviation of the
    same size, that would be an advantage of 1.
    """
    rewards_B, valid_B = _valid(rewards_B, valid_B)
    place_B, count_G = _groups(groups_B, valid_B)
    # A group without a reward keeps these bounds, whose difference is below any tolerance.
    bound_G = torch.full_like(count_G, torch.inf)
    low_G = bound_G.scatter_reduce(0, place_B[valid_B], rewards_B[valid_B], "amin")
    high_G = (-bound_G).scatter_reduce(0, place_B[valid_B], rewards_B[valid_B], "amax")
    size_G = torch.maximum(low_G.abs(), high_G.abs()).clamp(min=1.0)
    return valid_B & (high_G - low_G > eps * size_G)[place_B]


def process_advantages(
    step_scores: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    groups_B: torch.Tensor,
    T: int,
    eps: float = 1e-6,
) -> torch.Tensor:
    """advantages_BT, float32, under process supervision (rl4llm 6.3): scores are normalised over all steps of all of a group's
    completions, and a token's advantage is their sum over the steps that end at it or after it.

    `step_ends` are the steps' last tokens, counted from the completion's first one. A completion without steps gets 0, as does
    a group with one step or with equal scores. Raises ValueError for ends that are not in order or not within T.
    """
    lengths_B = torch.tensor([len(scores) for scores in step_scores], device=groups_B.device)
    scores_N = torch.tensor([one for scores in step_scores for one in scores], dtype=torch.float64, device=groups_B.device)
    normalised_N = group_advantages(scores_N, groups_B.repeat_interleave(lengths_B), "std", eps=eps)
    at_BT = torch.zeros((len(step_scores), T), dtype=torch.float64, device=groups_B.device)
    start = 0
    for b, ends in enumerate(step_ends):
        if len(ends) != len(step_scores[b]) or list(ends) != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] < T):
            raise ValueError(
                f"sequence {b}: {len(step_scores[b])} step scores with the ends {list(ends)}; there must be one end a score, "
                f"in order, from 0 to {T - 1}"
            )
        for end, score in zip(ends, normalised_N[start : start + len(ends)].tolist(), strict=True):
            at_BT[b, end] += score
        start += len(ends)
    return at_BT.flip(-1).cumsum(-1).flip(-1).float()


def _valid(rewards_B: torch.Tensor, valid_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards as float64, 0 where there is none, and which there are."""
    inside_B = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
    return torch.where(inside_B, rewards_B.double(), 0.0), inside_B


def _groups(groups_B: torch.Tensor, valid_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence's group by place, and how many sequences with a reward each group has."""
    names_G, place_B = groups_B.unique(return_inverse=True)
    return place_B, torch.zeros(len(names_G), dtype=torch.float64, device=place_B.device).index_add(
        0, place_B, valid_B.double()
    )


def _group_sum(values_B: torch.Tensor, place_B: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.zeros(groups, dtype=torch.float64, device=values_B.device).index_add(0, place_B, values_B)
