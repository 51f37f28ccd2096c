"""A training loop over a tiny model: what the tests of steps, setup and states share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_logprobs import PAD, random_sequences
from transformers import PreTrainedModel

from stages.data.batching import micro_batches, target_count
from stages.data.tokens import TokenTable
from stages.models.logprobs import TokenLogProbs
from stages.objectives.likelihood import nll_loss
from stages.specs.base import Runtime
from stages.specs.common import Optimizer
from stages.training.setup import accelerator_for, make_optimizer
from stages.training.step import optimization_step

LENGTHS, PROMPTS = [9, 4, 17, 6, 12, 2, 9], [3, 1, 9, 5, 0, 1, 4]


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    path = tmp_path / "rows.arrow"
    sequences = random_sequences(LENGTHS)
    TokenTable.write(path, ((s.tolist(), p, 10 + i) for i, (s, p) in enumerate(zip(sequences, PROMPTS, strict=True))))
    return TokenTable(path)


class Loop:
    """A training loop's objects over a tiny model, and one step of it on a table's rows."""

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer | None = None, steps: int = 4) -> None:
        self.accelerator: Accelerator = accelerator_for(Runtime(device="cpu"))
        module = TokenLogProbs(model).train()
        config = optimizer or Optimizer(lr=0.1, max_grad_norm=1e9)
        made, self.scheduler = make_optimizer([(config, module.parameters())], steps)
        prepared: Any = self.accelerator.prepare(module, made)
        self.module, self.optimizer = prepared
        self.accelerator.register_for_checkpointing(self.scheduler)

    def step(self, table: TokenTable, indices: list[int], tokens: int = 10_000, packed: bool = False, clip: float = 1e9) -> Any:
        total = target_count(table, indices, "completion")
        return optimization_step(
            self.accelerator,
            self.module,
            self.optimizer,
            self.scheduler,
            list(micro_batches(table, indices, "completion", tokens, packed, PAD)),
            lambda batch: nll_loss(self.module(batch), batch.target_BT, total),
            {"grad_norm": (list(self.module.parameters()), clip)},
            lambda: "step 1, rows [10]",
        )

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.module.parameters()])


def plain_loss(model: Any, table: TokenTable, indices: list[int]) -> torch.Tensor:
    """The oracle: each sequence alone through transformers, its completion's tokens summed, over the count of them all."""
    total, count = torch.zeros(()), 0
    for i in indices:
        ids_T = torch.tensor(table.ids(i))
        first = max(1, int(table.prompt_lengths[i]))
        logp_TV = model(ids_T[None].long(), use_cache=False).logits[0].log_softmax(-1)
        total = total - sum((logp_TV[t - 1, ids_T[t]] for t in range(first, len(ids_T))), torch.zeros(()))
        count += len(ids_T) - first
    return total / count
