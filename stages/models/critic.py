"""Critics: a reward model read at every token, and the module that policy and critic are trained as.

A critic's checkpoint is a reward model's; its value of a state is `(raw + reward_bias) * reward_scale`, in units of reward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.data.batching import TokenBatch
from stages.errors import InputError
from stages.models.backbone import hidden_states
from stages.models.load import LoadedPolicy
from stages.models.logprobs import TokenLogProbs
from stages.models.reward import RewardModel, new_reward_model, with_score_head


def critic_from_policy(folder: Path, seed: int) -> RewardModel:
    """A critic with the policy's backbone and a head of zeros, which expects 0 everywhere. `seed` is that of random weights."""
    critic = new_reward_model(folder, seed)
    nn.init.zeros_(critic.model.score.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return critic


def critic_on_policy(policy: LoadedPolicy, head: RewardModel | None) -> RewardModel:
    """A second head on the policy's own backbone: zeros, or that of an earlier critic which was trained on this backbone.

    Raises InputError for an earlier critic with other weights below its head, since its head reads other states.
    """
    critic = with_score_head(policy, seed=0)
    score: Any = critic.model.score
    if head is None:
        nn.init.zeros_(score.weight)
        return critic
    ours, theirs = (dict(one.model.base_model.named_parameters()) for one in (critic, head))
    if ours.keys() != theirs.keys() or not all(torch.equal(value, theirs[name]) for name, value in ours.items()):
        raise InputError(
            "the critic given has another backbone than the policy, which is to be shared: give the policy and the critic of "
            "one PPO run, or set critic.shared to false"
        )
    score.load_state_dict(head.model.score.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    critic.calibrate(head.bias, head.scale)
    return critic


class TokenValues(nn.Module):
    """The critic's values at the states from which a batch's targets were chosen."""

    def __init__(self, critic: RewardModel) -> None:
        super().__init__()
        self.model = critic.model
        self.bias, self.scale = critic.bias, critic.scale

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """values_BT: float32; at a target, the value of what stands before it; 0 elsewhere."""
        head: Any = self.model.score
        return values_at_targets(hidden_states(self.model, batch), batch, head, self.bias, self.scale)


def values_at_targets(hidden_BTH: torch.Tensor, batch: TokenBatch, head: nn.Linear, bias: float, scale: float) -> torch.Tensor:
    """values_BT from the last hidden states of a backbone."""
    where = batch.target_BT[:, 1:].bool()
    with torch.autocast(hidden_BTH.device.type, enabled=False):
        raw_N = F.linear(hidden_BTH[:, :-1][where].float(), head.weight.float()).squeeze(-1)
    values_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.float32, device=raw_N.device)
    values_BT[:, 1:] = values_BT[:, 1:].masked_scatter(where, (raw_N + bias) * scale)
    return values_BT


class ActorCritic(nn.Module):
    """Policy and critic as one module, which is what `Accelerator.prepare` wraps. Its parts have optimizers' settings of
    their own, and no parameter in common."""

    def __init__(self, policy: LoadedPolicy, critic: RewardModel) -> None:
        super().__init__()
        self.actor = TokenLogProbs(policy.model)
        self.critic = TokenValues(critic)

    def forward(
        self, batch: TokenBatch, temperature: float, entropy: bool = False, values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logp_BT, entropy_BT and values_BT at the targets, float32, 0 elsewhere; the last two are zeros when not asked for."""
        logp_BT, entropy_BT = self.actor.with_entropy(batch, temperature, entropy)
        return logp_BT, entropy_BT, self.critic(batch) if values else torch.zeros_like(logp_BT)


class TwoHeads(nn.Module):
    """The same with one backbone (rl4llm 4.3.6), which runs once and learns from both losses. The backbone is the actor's, as
    is its optimizer; the critic is its head alone."""

    def __init__(self, policy: LoadedPolicy, critic: RewardModel) -> None:
        super().__init__()
        self.actor = TokenLogProbs(policy.model)
        self.critic: Any = critic.model.score
        self.bias, self.scale = critic.bias, critic.scale

    def forward(
        self, batch: TokenBatch, temperature: float, entropy: bool = False, values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `ActorCritic`'s."""
        hidden_BTH = hidden_states(self.actor.model, batch)
        logp_BT, entropy_BT = self.actor.at_targets(hidden_BTH, batch, temperature, entropy)
        if not values:
            return logp_BT, entropy_BT, torch.zeros_like(logp_BT)
        return logp_BT, entropy_BT, values_at_targets(hidden_BTH, batch, self.critic, self.bias, self.scale)
