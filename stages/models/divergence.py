"""The divergence between a student and a teacher at given tokens, without ever holding `[B, T, V]`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.data.batching import TokenBatch
from stages.models.backbone import hidden_states
from stages.models.logprobs import head_logits, heads_at_targets, vocabulary
from stages.objectives.distillation import Direction, token_kl


class TokenDivergence(nn.Module):
    """Wraps a student so that its forward gives its divergence from a teacher, which is no part of the module: it is neither
    trained nor saved, and no process waits for its gradients."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, direction: Direction) -> None:
        super().__init__()
        self.student = student
        self.direction: Direction = direction
        self._teacher = (teacher.eval().requires_grad_(False),)

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """kl_BT: float32, of the distributions from which each target is drawn, 0 elsewhere (`token_kl`)."""
        [teacher] = self._teacher
        with torch.no_grad():
            taught_BTH = hidden_states(teacher, batch)
        size = max(vocabulary(self.student), vocabulary(teacher))
        return heads_at_targets(self._head, 1, size, batch, hidden_states(self.student, batch), taught_BTH)[0]

    def _head(self, ids_N: torch.Tensor, student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
        del ids_N
        [teacher] = self._teacher
        return token_kl(head_logits(self.student, student_NH), head_logits(teacher, teacher_NH), self.direction)[None]
