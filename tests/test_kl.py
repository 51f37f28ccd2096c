"""KL estimators token by token: values, signs and gradients by hand, what is refused, masks, the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stages.objectives.aggregate import Aggregate
from stages.objectives.kl import AdaptiveKL, Estimator, kl, kl_loss

MASK = torch.tensor([[1, 1, 1], [0, 1, 0]])
PER_TOKEN = {"token": [4, 4, 4, 4], "sequence": [6, 6, 6, 2], "constant": [10, 10, 10, 10]}


@pytest.mark.parametrize(
    ("estimator", "value"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_values_by_hand(estimator: Estimator, value: float) -> None:
    """The policy is twice as likely as the reference; then half as likely."""
    logp, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl(logp, reference, estimator).item() == pytest.approx(value, abs=1e-6)
    turned = {"k1": -value, "k2": value, "k3": 2 - 1 - math.log(2)}[estimator]
    assert kl(reference, logp, estimator).item() == pytest.approx(turned, abs=1e-6)


LOGP = st.floats(-80, 0, width=32)


@given(LOGP, LOGP)
@example(-1.0, math.nextafter(-1.0, 0))
@example(-20.0, 0.0)
def test_k3_and_k2_are_never_negative(logp: float, ref_logp: float) -> None:
    for estimator in ("k2", "k3"):
        assert kl(torch.tensor(logp), torch.tensor(ref_logp), estimator) >= 0


@pytest.mark.parametrize("size", [2.0**-n for n in range(1, 60, 2)])
def test_k3_is_never_negative_by_rounding(size: float) -> None:
    """Next to the reference k3 is half a square that is smaller than the last bits of its parts."""
    difference_N = torch.linspace(-size, size, 2001)
    assert kl(difference_N, torch.zeros(2001), "k3").min() >= 0


@pytest.mark.parametrize("how", PER_TOKEN)
@pytest.mark.parametrize(("estimator", "weighted"), [("k2", False), ("k2", True), ("k3", False), ("k3", True)])
def test_the_gradient_of_every_token_by_hand(estimator: Estimator, weighted: bool, how: Aggregate) -> None:
    """Of k2 log(pi/ref), of k3 1 - ref/pi; with the weights of an older policy both have (pi/old) log(pi/ref)."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = -torch.rand(3, 2, 3, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    loss = kl_loss(logp, ref_logp, MASK, estimator, old_logp if weighted else None, how, 10 if how == "constant" else None)
    [gradient] = torch.autograd.grad(loss, logp)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for (b, t), divisor in zip(MASK.nonzero().tolist(), PER_TOKEN[how], strict=True):
        ratio, older = (math.exp(logp[b, t].item() - other[b, t].item()) for other in (ref_logp, old_logp))
        one = 1 - 1 / ratio if estimator == "k3" and not weighted else math.log(ratio)
        expected[b, t] = one * (older if weighted else 1) / divisor
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_at_the_reference_there_is_no_penalty_and_no_push(estimator: Estimator) -> None:
    logp = torch.tensor([[-1.0, -20.0, -1e-4]], requires_grad=True)
    loss = kl_loss(logp, logp.detach(), torch.ones(1, 3), estimator, logp.detach() - 0.5)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_log_probs_of_bfloat16_are_subtracted_in_float32() -> None:
    for estimator in ("k1", "k2", "k3"):
        found = kl(torch.tensor(-30.0, dtype=torch.bfloat16), torch.tensor(-30.125, dtype=torch.bfloat16), estimator)
        assert found.dtype == torch.float32
        assert found.item() == kl(torch.tensor(-30.0), torch.tensor(-30.125), estimator).item()


def test_k1_is_refused_as_a_loss_and_others_altogether() -> None:
    with pytest.raises(ValueError, match="0 in expectation"):
        kl_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "k1")
    with pytest.raises(ValueError, match="must be k1, k2 or k3, not 'k4'"):
        kl(torch.zeros(1), torch.zeros(1), "k4")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_what_is_outside_the_mask_does_not_leak(estimator: Estimator, poison: float) -> None:
    logp = torch.tensor([[-1.0, poison]], requires_grad=True)
    clean = torch.tensor([[-1.0]], requires_grad=True)
    one, other = torch.tensor([[-2.0, poison]]), torch.tensor([[-1.5, -poison]])
    loss = kl_loss(logp, one, torch.tensor([[1, 0]]), estimator, other)
    alone = kl_loss(clean, one[:, :1], torch.ones(1, 1), estimator, other[:, :1])
    assert loss.item() == alone.item() > 0
    expected = torch.autograd.grad(alone, clean)[0].item()
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[expected, 0.0]]


def test_adaptive_coefficient() -> None:
    controller = AdaptiveKL(target=0.03, coefficient=0.2)
    assert controller.update(0.03 / 1.5 - 1e-6) == 0.1
    assert controller.update(0.03 / 1.5 + 1e-6) == 0.1
    assert controller.update(0.03 * 1.5 - 1e-6) == 0.1
    assert controller.update(0.03 * 1.5 + 1e-6) == 0.2
    assert controller.coefficient == 0.2
    for target, coefficient in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            AdaptiveKL(target, coefficient)
