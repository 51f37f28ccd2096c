"""Log-probs of given tokens under a language model, in float32, without ever holding `[B, T, V]`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.data.batching import TokenBatch

# Float32 logits of one chunk: 256 MiB.
CHUNK_ELEMENTS = 2**26


class TokenLogProbs(nn.Module):
    """Wraps a causal LM so that its forward gives log-probs. It is what `Accelerator.prepare` wraps: DDP and FSDP need all
    of the computation inside one module's forward.

    The backbone runs once; the head only where a target is, in chunks that are recomputed in the backward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, temperature: float = 1.0) -> torch.Tensor:
        """logp_BT: float32, log pi(token t | tokens before t) at the targets, 0 elsewhere; a sequence's start is never one."""
        hidden_BTH = self.model.base_model(
            input_ids=batch.ids_BT,
            attention_mask=batch.attention_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        where = batch.target_BT[:, 1:].bool()
        hidden_NH, ids_N = hidden_BTH[:, :-1][where], batch.ids_BT[:, 1:][where]
        logp_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.float32, device=ids_N.device)
        if ids_N.numel() == 0:
            return logp_BT + 0.0 * hidden_BTH.sum()
        chunk = max(1, CHUNK_ELEMENTS // self.model.config.get_text_config().vocab_size)
        parts = list(zip(hidden_NH.split(chunk), ids_N.split(chunk), strict=True))
        recompute = len(parts) > 1 and torch.is_grad_enabled()
        logp_N = torch.cat(
            [
                checkpoint(self._head, hidden, ids, temperature, use_reentrant=False)
                if recompute
                else self._head(hidden, ids, temperature)
                for hidden, ids in parts
            ]  # pyright: ignore[reportArgumentType]
        )
        logp_BT[:, 1:] = logp_BT[:, 1:].masked_scatter(where, logp_N)
        return logp_BT

    def _head(self, hidden_NH: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> torch.Tensor:
        logits_NV = head_logits(self.model, hidden_NH)
        return -F.cross_entropy(logits_NV / temperature if temperature != 1.0 else logits_NV, ids_N, reduction="none")


def head_logits(model: PreTrainedModel, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Float32 logits from the backbone's last hidden states, with the scalings that some families put on them."""
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    logits_NV = head(hidden_NH).float()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits_NV = logits_NV * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits_NV = logits_NV / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV
