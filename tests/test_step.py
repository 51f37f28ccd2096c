"""One optimizer step: its gradient whatever the micro-batches, clipping, and losses that are not finite."""

from __future__ import annotations

from typing import Any

import looping
import pytest
import torch
from looping import LENGTHS, Loop, plain_loss
from test_logprobs import PAD, tiny_model

from stages.data.batching import micro_batches
from stages.data.tokens import TokenTable
from stages.errors import InputError
from stages.objectives.likelihood import nll_loss
from stages.training.step import optimization_step

table = looping.table


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 40, 10_000])
def test_the_gradient_does_not_depend_on_micro_batches(table: TokenTable, tokens: int, packed: bool) -> None:
    indices = list(range(len(LENGTHS)))
    model = tiny_model("llama")
    expected = plain_loss(model, table, indices)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loop = Loop(tiny_model("llama"))
    metrics = loop.step(table, indices, tokens, packed)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(loop.gradient(), gradient, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_clipped_to_its_global_norm(table: TokenTable) -> None:
    loop, free = Loop(tiny_model("llama")), Loop(tiny_model("llama"))
    norm = free.step(table, [0, 1, 2])["grad_norm"]
    assert loop.step(table, [0, 1, 2], clip=norm / 3)["grad_norm"] == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(loop.gradient(), free.gradient() / 3, atol=1e-6, rtol=1e-5)


def broken(kind: str, value: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite, or one that is, with a gradient that is not."""
    return value * float(kind) if kind in ("nan", "inf") else value + (value - value.detach()).abs().sqrt()


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(table: TokenTable, kind: str) -> None:
    loop = Loop(tiny_model("llama"))
    loop.step(table, [0, 1])
    before, moments = loop.weights(), [v["exp_avg"].clone() for v in loop.optimizer.state.values()]
    batches = list(micro_batches(table, [0, 1, 2], "completion", 1, False, PAD))
    assert len(batches) == 3
    calls: list[int] = []

    def loss(batch: Any) -> torch.Tensor:
        calls.append(1)
        value = nll_loss(loop.module(batch), batch.target_BT)
        return broken(kind, value) if len(calls) == 2 else value

    with pytest.raises(InputError, match=r"^step 7, rows \[3, 5\] of train: .*(nan|inf).*weights were not changed"):
        optimization_step(
            loop.accelerator,
            loop.module,
            loop.optimizer,
            loop.scheduler,
            batches,
            loss,
            {"grad_norm": (list(loop.module.parameters()), 1.0)},
            lambda: "step 7, rows [3, 5] of train",
        )
    assert torch.equal(loop.weights(), before)
    assert all(torch.equal(a, v["exp_avg"]) for a, v in zip(moments, loop.optimizer.state.values(), strict=True))
    assert loop.scheduler.last_epoch == 1
