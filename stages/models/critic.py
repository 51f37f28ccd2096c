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
from stages.models.backbone import hidden_states
from stages.models.load import LoadedPolicy
from stages.models.logprobs import TokenLogProbs
from stages.models.reward import RewardModel, new_reward_model


def critic_from_policy(folder: Path, seed: int) -> RewardModel:
    """A critic with the policy's backbone and a head of zeros, which expects 0 everywhere. `seed` is that of random weights."""
    critic = new_reward_model(folder, seed)
    nn.init.zeros_(critic.model.score.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return critic


class TokenValues(nn.Module):
    """The critic's values at the states from which a batch's targets were chosen."""

    def __init__(self, critic: RewardModel) -> None:
        super().__init__()
        self.model = critic.model
        self.bias, self.scale = critic.bias, critic.scale

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """values_BT: float32; at a target, the value of what stands before it; 0 elsewhere."""
        hidden_BTH = hidden_states(self.model, batch)
        where = batch.target_BT[:, 1:].bool()
        head: Any = self.model.score
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            raw_N = F.linear(hidden_BTH[:, :-1][where].float(), head.weight.float()).squeeze(-1)
        values_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.float32, device=raw_N.device)
        values_BT[:, 1:] = values_BT[:, 1:].masked_scatter(where, (raw_N + self.bias) * self.scale)
        return values_BT


class ActorCritic(nn.Module):
    """Policy and critic as one module, which is what `Accelerator.prepare` wraps. Its parts have optimizers' settings of
    their own, and no parameter in common."""

    def __init__(self, policy: LoadedPolicy, critic: RewardModel) -> None:
        super().__init__()
        self.actor = TokenLogProbs(policy.model)
        self.critic = TokenValues(critic)

    def forward(
        self, batch: TokenBatch, temperature: float, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logp_BT, entropy_BT (zeros when not asked for) and values_BT at the targets, float32, 0 elsewhere."""
        logp_BT, entropy_BT = self.actor.with_entropy(batch, temperature, entropy)
        return logp_BT, entropy_BT, self.critic(batch)
