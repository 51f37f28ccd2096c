"""Two parts of one module, each with settings, a schedule and a clipped norm of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_logprobs import PAD, random_sequences

from stages.data.batching import TokenBatch, pad
from stages.errors import InputError
from stages.specs.base import Runtime
from stages.specs.common import Optimizer
from stages.training.setup import accelerator_for, make_optimizer, rate
from stages.training.step import optimization_step


class Pair(torch.nn.Module):
    """Two parts, each a matrix and a vector, whose losses have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        x_BT = batch.ids_BT[:, :3].float()
        return self.one(x_BT).square().sum(), (self.other(x_BT) - 1).square().sum()


ONE = Optimizer(lr=0.1, schedule="linear", warmup=0.4, weight_decay=0.3, beta1=0.5, beta2=0.6, eps=1e-3)
OTHER = Optimizer(lr=0.02, schedule="cosine", warmup=0.0, weight_decay=0.0, beta1=0.95, beta2=0.99, eps=1e-6)


def pair_step(loop: Any, limits: tuple[float, float] = (1e9, 1e9), broken: str = "") -> dict[str, float]:
    parts = {"grad_norm": loop.module.one, "critic_grad_norm": loop.module.other}
    clip = {name: (list(part.parameters()), limit) for (name, part), limit in zip(parts.items(), limits, strict=True)}

    def loss(batch: TokenBatch) -> torch.Tensor:
        values = dict(zip(("one", "other"), loop.module(batch), strict=True))
        # The value stays as it is; the gradient is not a number.
        return sum((v + (v - v.detach()).abs().sqrt() if n == broken else v for n, v in values.items()), torch.zeros(()))

    batches = [pad(random_sequences([4, 3]), [1, 1], PAD, (0, 1)), pad(random_sequences([5], seed=1), [1], PAD, (2,))]
    return optimization_step(
        loop.accelerator, loop.module, loop.optimizer, loop.scheduler, batches, loss, clip, lambda: "step 1, rows [0]"
    )


class PairLoop:
    def __init__(self, steps: int = 5, names: tuple[str, ...] = ("one", "other")) -> None:
        self.accelerator: Accelerator = accelerator_for(Runtime(device="cpu"))
        module, configs = Pair(), {"one": ONE, "other": OTHER}
        # Parameters come as a generator, which can be read once.
        parts = [(configs[name], (p for p in getattr(module, name).parameters())) for name in names]
        made, self.scheduler = make_optimizer(parts, steps)
        prepared: Any = self.accelerator.prepare(module, made)
        self.module, self.optimizer = prepared

    def weights(self, name: str) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in getattr(self.module, name).parameters()]

    def gradient(self, name: str) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in getattr(self.module, name).parameters()])


@pytest.mark.parametrize("names", [("one", "other"), ("other", "one")])
def test_each_part_keeps_its_own_settings_and_schedule(names: tuple[str, ...]) -> None:
    """As if each part had an AdamW and a schedule of its own, and its matrix alone decayed."""
    loop, oracle = PairLoop(5, names), Pair()
    separate = []
    for name, config in (("one", ONE), ("other", OTHER)):
        for parameter in getattr(oracle, name).parameters():
            decay = config.weight_decay if parameter.ndim == 2 else 0.0
            betas = (config.beta1, config.beta2)
            made = torch.optim.AdamW([parameter], lr=config.lr, betas=betas, eps=config.eps, weight_decay=decay)
            separate.append((config, made))
    for step in range(5):
        for config, made in separate:
            made.param_groups[0]["lr"] = config.lr * rate(config, step, 5)
            made.zero_grad()
        for batch in (pad(random_sequences([4, 3]), [1, 1], PAD, (0, 1)), pad(random_sequences([5], seed=1), [1], PAD, (2,))):
            sum(oracle(batch), torch.zeros(())).backward()
        for _, made in separate:
            made.step()
        pair_step(loop)
        for ours, theirs in zip(loop.module.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ONE.lr * rate(ONE, 3, 5), OTHER.lr * rate(OTHER, 3, 5)) != (ONE.lr, OTHER.lr)
    assert loop.scheduler.get_last_lr() == pytest.approx([0.0] * 4)


def test_the_first_rate_is_that_of_the_first_part() -> None:
    loop = PairLoop()
    assert loop.scheduler.get_last_lr() == pytest.approx([0.05, 0.05, 0.02, 0.02])


def test_clipping_one_group_leaves_the_other_alone() -> None:
    free, clipped, both = PairLoop(), PairLoop(), PairLoop()
    norms = pair_step(free)
    assert list(norms) == ["loss", "grad_norm", "critic_grad_norm"]
    for name, part in (("grad_norm", "one"), ("critic_grad_norm", "other")):
        assert norms[name] == pytest.approx(free.gradient(part).norm().item(), rel=1e-6)
    # The norms that are told are those before the clip.
    assert pair_step(clipped, (1e9, norms["critic_grad_norm"] / 4)) == pytest.approx(norms, rel=1e-6)
    assert torch.equal(clipped.gradient("one"), free.gradient("one"))
    torch.testing.assert_close(clipped.gradient("other"), free.gradient("other") / 4, atol=0, rtol=1e-5)
    assert pair_step(both, (norms["grad_norm"] / 2, norms["critic_grad_norm"] * 2)) == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(both.gradient("one"), free.gradient("one") / 2, atol=0, rtol=1e-5)
    assert torch.equal(both.gradient("other"), free.gradient("other"))


@pytest.mark.parametrize(("broken", "named"), [("one", "grad_norm"), ("other", "critic_grad_norm")])
def test_a_gradient_that_is_not_finite_in_either_group_stops_before_the_weights_change(broken: str, named: str) -> None:
    loop = PairLoop()
    pair_step(loop)
    before = loop.weights("one") + loop.weights("other")
    with pytest.raises(InputError, match=rf"^step 1, rows \[0\]: loss is [\d.]+,.* {named} is nan.*weights were not changed"):
        pair_step(loop, broken=broken)
    after = loop.weights("one") + loop.weights("other")
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert loop.scheduler.last_epoch == 1
    pair_step(loop)
    assert not torch.equal(loop.weights("one")[0], before[0])
