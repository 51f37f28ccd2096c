"""The completions of one prompt, which are compared with each other."""

from __future__ import annotations

import numpy as np
import torch

from stages.data.batching import TokenBatch
from stages.objectives.advantages import spread_B
from stages.objectives.preference import ranked_group
from stages.rollouts.batch import Rollouts
from stages.specs.grpo import GrpoConfig


def with_spread(config: GrpoConfig, rollouts: Rollouts) -> np.ndarray:
    """Which completions have a reward, and a group in which differs what its advantages are made of: rewards, or under process
    supervision the scores of steps."""
    reward_B, groups_B = rollouts.each["reward"], torch.from_numpy(rollouts.groups_B)
    if config.supervision == "outcome":
        return spread_B(reward_B, groups_B, ~reward_B.isnan()).numpy()
    groups_N = groups_B.repeat_interleave(torch.tensor([len(steps) for steps in rollouts.steps]))
    scores_N = torch.tensor([score for steps in rollouts.steps for _, score in steps], dtype=torch.float64)
    return (~reward_B.isnan() & torch.isin(groups_B, groups_N[spread_B(scores_N, groups_N)])).numpy()


def by_group(rollouts: Rollouts, indices: np.ndarray) -> list[np.ndarray]:
    """Some completions, those of a group together."""
    groups_B = rollouts.groups_B[indices]
    return [indices[groups_B == group] for group in np.unique(groups_B)]


def ranks(reward_G: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The ranks of a group's rewards, 1 the best. As in `spread_B`, rewards that differ by no more than rounding are alike."""
    sorted_G, order_G = reward_G.sort(descending=True)
    apart_G = -sorted_G.diff() > eps * reward_G.abs().max().clamp(min=1.0)
    ranks_G = torch.ones_like(order_G)
    ranks_G[order_G[1:]] += apart_G.cumsum(0)
    return ranks_G


def ordered_pairs(reward_G: torch.Tensor) -> int:
    """How many pairs of a group's rewards have an order."""
    ranks_G = ranks(reward_G)
    return int((ranks_G[:, None] < ranks_G[None, :]).sum())


def ranked_pairs(rollouts: Rollouts, batch: TokenBatch, logp_BT: torch.Tensor, beta: float) -> torch.Tensor:
    """`ranked_group` by reward, summed over a batch's groups; without a group, 0 that gradients flow through."""
    logp_B, indices = logp_BT.sum(-1), np.array(batch.indices, dtype=np.int64)
    losses = [0.0 * logp_B.sum()]
    for unit in by_group(rollouts, indices):
        places = np.flatnonzero(np.isin(indices, unit))
        ranks_G = ranks(rollouts.each["reward"][indices[places]]).to(logp_B.device)
        losses.append(ranked_group(logp_B[places], ranks_G, beta))
    return torch.stack(losses).sum()


def counted(config: GrpoConfig, rollouts: Rollouts) -> np.ndarray:
    """Which completions the loss is a mean of: those with a reward, unless they are masked, or other prompts have taken their
    group's place."""
    counted_B = ~rollouts.each["reward"].isnan().numpy()
    if config.truncation.how == "mask":
        counted_B &= ~rollouts.truncated_B
    return counted_B & with_spread(config, rollouts) if config.refill.rounds else counted_B


def minibatches(config: GrpoConfig, rollouts: Rollouts, step: int, epoch: int) -> list[np.ndarray]:
    """The counted completions by minibatch of one pass: equally many groups in each, all of a group in one, in a seeded
    order."""
    counted_B, groups_B = counted(config, rollouts), rollouts.groups_B
    order = np.random.default_rng([config.seed, step, epoch]).permutation(np.unique(groups_B[counted_B]))
    return [np.flatnonzero(counted_B & np.isin(groups_B, some)) for some in np.array_split(order, config.minibatches)]


def taught(config: GrpoConfig, rollouts: Rollouts) -> np.ndarray:
    """Which of them have a loss that depends on the policy."""
    counted_B = counted(config, rollouts)
    if config.reference_kl.penalised_in is not None:
        return counted_B
    if config.objective == "ranked_pairs":
        return counted_B & with_spread(config, rollouts)
    return counted_B & (rollouts.sums_B(rollouts.tokens["advantages"].abs()) > 0)


class Totals:
    """What the sums over a minibatch are divided by, over all processes: `mean`, by `aggregate`, over the `counted`
    completions; `run`, the tokens of the `chosen` ones, whose loss is computed, and `pairs`, their groups' ordered pairs."""

    def __init__(self, config: GrpoConfig, rollouts: Rollouts, counted: np.ndarray, chosen: np.ndarray) -> None:
        tokens = int(rollouts.lengths_B[counted].sum())
        each = {"sequence": len(counted), "token": tokens, "constant": len(counted) * config.sampling.max_new_tokens}
        self.mean = max(1, each[config.aggregate])
        self.run = max(1, int(rollouts.lengths_B[chosen].sum()))
        self.pairs = max(1, sum(ordered_pairs(rollouts.each["reward"][unit]) for unit in by_group(rollouts, chosen)))


def group_metrics(config: GrpoConfig, rollouts: Rollouts) -> dict[str, float]:
    """Groups sampled, those among them that teach nothing, and completions without a reward."""
    groups = len(np.unique(rollouts.groups_B))
    spread = len(np.unique(rollouts.groups_B[with_spread(config, rollouts)]))
    missing = float(rollouts.each["reward"].isnan().sum())
    return {"groups": float(groups), "groups_without_spread": float(groups - spread), "rewards_missing": missing}
