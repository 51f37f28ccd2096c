"""The likelihood loss: hand-worked numbers, masks, and the number to divide by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.objectives.likelihood import nll_loss

LOGP = torch.tensor([[0.1, 0.5, 0.25], [0.125, 0.5, 0.75]]).log()
MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])


def test_hand_worked() -> None:
    # -(ln 1/2 + ln 1/4 + ln 1/8) / 3 = 6 ln 2 / 3
    assert float(nll_loss(LOGP, MASK)) == pytest.approx(2 * math.log(2), rel=1e-6)


def test_total_divides_in_place_of_the_count() -> None:
    assert float(nll_loss(LOGP, MASK, 12.0)) == pytest.approx(math.log(2) / 2, rel=1e-6)


@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_what_is_outside_the_mask_never_leaks(outside: float) -> None:
    logp_BT = torch.where(MASK == 1, LOGP, outside).requires_grad_()
    loss = nll_loss(logp_BT, MASK)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert logp_BT.grad is not None
    torch.testing.assert_close(logp_BT.grad, -MASK / 3)


def test_nan_inside_the_mask_is_not_hidden() -> None:
    assert nll_loss(torch.where(MASK == 1, math.nan, LOGP), MASK).isnan()


def test_an_empty_mask_gives_zero() -> None:
    assert float(nll_loss(LOGP, torch.zeros_like(MASK))) == 0.0


@given(
    rows=st.lists(st.lists(st.tuples(st.floats(-20, 0), st.booleans()), min_size=4, max_size=4), min_size=2, max_size=6),
    cut=st.integers(1, 5),
)
def test_micro_batches_with_one_total_add_up(rows: list[list[tuple[float, bool]]], cut: int) -> None:
    logp_BT = torch.tensor([[value for value, _ in row] for row in rows], dtype=torch.float64)
    mask_BT = torch.tensor([[int(counts) for _, counts in row] for row in rows])
    kept = [value for row in rows for value, counts in row if counts]
    whole = nll_loss(logp_BT, mask_BT)
    assert float(whole) == pytest.approx(-sum(kept) / max(1, len(kept)), abs=1e-9)
    if kept:
        parts = [nll_loss(logp_BT[part], mask_BT[part], len(kept)) for part in (slice(None, cut), slice(cut, None))]
        assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-9)
