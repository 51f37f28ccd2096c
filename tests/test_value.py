"""The critic's loss by hand, its clipping, and explained variance."""

from __future__ import annotations

import pytest
import torch

from stages.objectives.value import explained_variance, value_loss

ONE = torch.ones(1, 1)


def test_half_the_mean_squared_error() -> None:
    values, returns = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[2.0, 4.0, float("nan")]])
    mask = torch.tensor([[1, 1, 0]])
    assert value_loss(values, values, returns, mask).item() == pytest.approx(0.5 * (1 + 4) / 2)
    assert value_loss(values, values, returns, mask, total=10).item() == pytest.approx(0.5 * 5 / 10)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.5, 0.5 * 0.8**2, 0.0),  # moved towards the return by more than the clip: the held value decides, no gradient
        (-1.0, 0.5 * 3.0**2, -3.0),  # moved away: the larger error is the real one
        (1.1, 0.5 * 0.9**2, -0.9),  # inside the clip
    ],
)
def test_clipping(value: float, loss: float, gradient: float) -> None:
    """The old value is 1, the return 2, the clip 0.2."""
    values = torch.tensor([[value]], requires_grad=True)
    got = value_loss(values, ONE, 2 * ONE, ONE, clip=0.2)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(got, values)[0].item() == pytest.approx(gradient, abs=1e-6)


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert explained_variance(2 * torch.ones(1, 4), returns, mask).item() == pytest.approx(0)
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1)
    assert explained_variance(returns, torch.ones(1, 4), mask).item() == 0
