"""GAE against a brute-force forward sum, at both ends of lambda, with masks, truncation and NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.advantages import gae, whiten


def brute_force(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float
) -> tuple[list[float], list[float]]:
    """Eq. 25 as it stands: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values[1:], bootstrap]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    steps = range(len(deltas))
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in steps if k >= t) for t in steps]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


numbers = st.floats(-3, 3, allow_nan=False, width=32)
tokens = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(tokens, st.floats(0, 1), st.floats(0, 1), numbers)
def test_equals_the_forward_sum_over_the_masked_tokens(
    tokens: list[tuple[float, float, bool]], gamma: float, lam: float, bootstrap: float
) -> None:
    rewards, values, mask = (list(column) for column in zip(*tokens, strict=True))
    inside = [t for t, keep in enumerate(mask) if keep]
    poisoned_rewards, poisoned_values = (
        torch.tensor([[x if keep else float("nan") for x, keep in zip(row, mask, strict=True)]]) for row in (rewards, values)
    )
    advantages, returns = gae(poisoned_rewards, poisoned_values, torch.tensor([mask]), gamma, lam, torch.tensor([bootstrap]))
    if inside:
        expected = brute_force([rewards[t] for t in inside], [values[t] for t in inside], gamma, lam, bootstrap)
        torch.testing.assert_close(advantages[0, inside], torch.tensor(expected[0]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(returns[0, inside], torch.tensor(expected[1]), atol=1e-4, rtol=1e-4)
    outside = [t for t in range(len(mask)) if t not in inside]
    assert not advantages[0, outside].any()
    assert not returns[0, outside].any()


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=generator)
    return rewards, values, torch.ones(3, 5)


def test_lambda_0_is_the_td_error() -> None:
    rewards, values, mask = example()
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * after - values)


def test_lambda_1_is_the_return_less_the_value_and_its_returns_know_no_critic() -> None:
    rewards, values, mask = example()
    returns = torch.stack([sum(0.9 ** (k - t) * rewards[:, k] for k in range(t, 5)) for t in range(5)], dim=1)  # pyright: ignore
    advantages, targets = gae(rewards, values, mask, 0.9, 1.0)
    torch.testing.assert_close(advantages, returns - values)
    torch.testing.assert_close(targets, returns)


def test_terminated_bootstraps_0_and_truncated_the_given_value() -> None:
    reward, value, mask = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [0.5]]), torch.ones(2, 1)
    advantages, _ = gae(reward, value, mask, 0.5, 0.9, torch.tensor([0.0, 4.0]))
    assert advantages.tolist() == [[0.5], [2.5]]


def test_no_gradient_flows() -> None:
    rewards, values, mask = example()
    advantages, returns = gae(rewards, values.requires_grad_(), mask, 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_respects_the_mask(shift_mean: bool) -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    whitened = whiten(values, mask, shift_mean)
    inside = whitened[mask.bool()]
    assert inside.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert inside.mean().item() == pytest.approx(0 if shift_mean else 3, abs=1e-5)
    assert not whitened[~mask.bool()].any()


def test_whitening_without_spread_gives_no_signal() -> None:
    assert not whiten(torch.full((2, 2), 7.0), torch.ones(2, 2)).any()
