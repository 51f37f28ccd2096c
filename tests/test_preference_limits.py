"""What holds for every preference objective: types, extremes, what changes nothing, what is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.objectives import preference as ours
from stages.objectives import preference_variants as variants

Loss = Callable[..., torch.Tensor]
WITH_REFERENCE: dict[str, tuple[Loss, dict[str, Any]]] = {
    "dpo": (ours.dpo, {"beta": 0.5}),
    "conservative": (ours.dpo, {"beta": 0.5, "label_smoothing": 0.2}),
    "robust_dpo": (ours.robust_dpo, {"beta": 0.5, "label_smoothing": 0.2}),
    "length_normalised_dpo": (ours.length_normalised_dpo, {"beta": 0.5}),
    "spin": (ours.spin, {"beta": 0.5}),
    "ipo": (ours.ipo, {"tau": 0.5}),
    "hinge": (variants.hinge, {"beta": 0.5}),
    "exo": (variants.exo, {"beta": 0.5}),
    "nca": (variants.nca, {"beta": 0.5}),
    "bco": (variants.bco, {"beta": 0.5}),
    "sppo": (variants.sppo, {"beta": 0.5}),
    "apo_zero": (variants.apo_zero, {"beta": 0.5}),
    "apo_down": (variants.apo_down, {"beta": 0.5}),
    "discopop": (variants.discopop, {"beta": 0.5}),
}
WITHOUT_REFERENCE: dict[str, tuple[Loss, dict[str, Any]]] = {
    "reference_free_dpo": (ours.reference_free_dpo, {"beta": 0.5}),
    "simpo": (ours.simpo, {"beta": 0.5, "gamma": 0.3}),
    "orpo": (ours.orpo, {"beta": 0.5}),
}
WITH_NLL: dict[str, tuple[Loss, dict[str, Any]]] = {
    "cpo": (ours.cpo, {"beta": 0.5, "nll_coefficient": 0.1}),
    "dpo_nll": (ours.dpo_nll, {"beta": 0.5, "nll_coefficient": 0.1}),
}
ALL = WITH_REFERENCE | WITHOUT_REFERENCE | WITH_NLL
# Those that see a pair only through its margin, log(pi/ref)(chosen) - log(pi/ref)(rejected).
BY_MARGIN = [name for name in WITH_REFERENCE if name not in ("nca", "bco", "sppo", "apo_zero", "apo_down")]
LOGP = st.floats(-80, 0, width=32)


def losses_B(name: str, pc: torch.Tensor, pr: torch.Tensor, rc: torch.Tensor, rr: torch.Tensor) -> torch.Tensor:  # noqa: N802
    loss, settings = ALL[name]
    given = {"pc": pc, "pr": pr, "rc": rc, "rr": rr, "nll_B": -pc}
    return loss(**{key: given[key] for key in inspect.signature(loss).parameters if key in given}, **settings)


def column(*values: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pc, pr, rc, rr = (torch.tensor([value]) for value in values)
    return pc, pr, rc, rr


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_stay_finite(name: str, margin: float) -> None:
    pc, pr = torch.tensor([min(margin, 0.0)], requires_grad=True), torch.tensor([min(-margin, 0.0)], requires_grad=True)
    losses = losses_B(name, pc, pr, torch.tensor([-5.0]), torch.tensor([-5.0]))
    assert losses.isfinite().all()
    assert all(one.isfinite().all() for one in torch.autograd.grad(losses.sum(), (pc, pr)))


@pytest.mark.parametrize(
    "name", ["dpo", "spin", "length_normalised_dpo", "hinge", "apo_zero", "discopop", "reference_free_dpo"]
)
def test_what_is_right_by_far_is_left_alone(name: str) -> None:
    pc, pr = torch.tensor([-10.0], requires_grad=True), torch.tensor([-1e4], requires_grad=True)
    losses = losses_B(name, pc, pr, torch.tensor([-5000.0]), torch.tensor([-5000.0]))
    assert losses.item() == 0
    assert [one.item() for one in torch.autograd.grad(losses.sum(), (pc, pr))] == [0.0, 0.0]


@pytest.mark.parametrize(("name", "slope"), [("dpo", 0.5), ("hinge", 0.5), ("reference_free_dpo", 0.5), ("simpo", 0.5)])
def test_what_is_wrong_by_far_is_pushed_with_beta(name: str, slope: float) -> None:
    pc, pr = torch.tensor([-1e4], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    losses = losses_B(name, pc, pr, torch.tensor([-5000.0]), torch.tensor([-5000.0]))
    assert [one.item() for one in torch.autograd.grad(losses.sum(), (pc, pr))] == pytest.approx([-slope, slope])


@pytest.mark.parametrize(("name", "away"), [("conservative", 1.0), ("robust_dpo", -1.0)])
def test_a_chance_of_wrong_labels_at_a_margin_too_far(name: str, away: float) -> None:
    """Conservative DPO pulls a margin back beyond log((1 - e)/e); robust DPO pushes on: its gain has no end."""
    pc = torch.tensor([-10.0], requires_grad=True)
    losses = losses_B(name, pc, torch.tensor([-1e4]), torch.tensor([-5000.0]), torch.tensor([-5000.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), pc)
    assert gradient.item() == pytest.approx(away * 0.5 * (0.2 if name == "conservative" else 0.2 / 0.6))


def test_a_conservative_margin_has_its_best_place() -> None:
    best = math.log(0.8 / 0.2) / 0.5
    pc = torch.tensor([best], requires_grad=True)
    zero = torch.zeros(1)
    assert torch.autograd.grad(losses_B("conservative", pc, zero, zero, zero).sum(), pc)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("certain", [(0.0, 0.0), (0.0, -3.0), (-3.0, 0.0), (-1e-9, -1e-12)])
def test_orpo_of_a_sure_completion_is_finite(certain: tuple[float, float]) -> None:
    """The odds of probability 1 are infinite."""
    pc, pr = (torch.tensor([one], requires_grad=True) for one in certain)
    losses = ours.orpo(pc, pr, 0.1)
    assert losses.isfinite().all()
    assert all(one.isfinite().all() for one in torch.autograd.grad(losses.sum(), (pc, pr)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_float32_and_computed_so(name: str, dtype: torch.dtype) -> None:
    columns = -8 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    pc, pr, rc, rr = columns.to(dtype)
    found = losses_B(name, pc, pr, rc, rr)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses_B(name, pc.float(), pr.float(), rc.float(), rr.float()), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_unpaired_and_segmented_losses_are_float32(dtype: torch.dtype) -> None:
    p, r = (-8 * torch.rand(2, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    z = ours.kto_reference_point(p, r, 0.3)
    assert z.dtype == ours.implicit_reward(p, r, 0.3).dtype == torch.float32
    assert ours.kto(p, r, torch.tensor([1, 0, 1, 0, 1, 1]), z, 0.3).dtype == torch.float32
    ones = torch.ones(2, 3, dtype=dtype)
    p, r = p.view(2, 3), r.view(2, 3)
    assert ours.two_d_dpo(p, r, r, p, ones, ones, 0.3, ones).dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
@given(st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP), min_size=2, max_size=5))
def test_a_pairs_loss_does_not_depend_on_the_batch(name: str, pairs: list[tuple[float, float, float, float]]) -> None:
    """Contract 8: one row a pair, whatever is beside it."""
    pc, pr, rc, rr = torch.tensor(pairs).T
    alone = torch.cat([losses_B(name, *column(*pair)) for pair in pairs])
    torch.testing.assert_close(losses_B(name, pc, pr, rc, rr), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BY_MARGIN)
@given(LOGP, LOGP, LOGP, LOGP, st.floats(-40, 40, width=32))
def test_only_the_margin_matters(name: str, pc: float, pr: float, rc: float, rr: float, shift: float) -> None:
    """A constant added to both completions of a model, or to a completion under both models, changes nothing."""
    plain = losses_B(name, *column(pc, pr, rc, rr))
    for moved in [(pc + shift, pr + shift, rc, rr), (pc, pr, rc + shift, rr + shift), (pc + shift, pr, rc + shift, rr)]:
        torch.testing.assert_close(losses_B(name, *column(*moved)), plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["nca", "bco", "sppo", "apo_zero", "apo_down"])
def test_others_see_each_completion_against_the_reference(name: str) -> None:
    plain = losses_B(name, *column(-20, -21, -20, -20))
    torch.testing.assert_close(losses_B(name, *column(-15, -26, -15, -25)), plain)
    assert (losses_B(name, *column(-16, -17, -20, -20)) - plain).abs().item() > 1e-2


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0, 0.5), st.sampled_from([0.1, 1.0]))
def test_swapped_labels(pc: float, pr: float, rc: float, rr: float, smoothing: float, beta: float) -> None:
    right, wrong = column(pc, pr, rc, rr), column(pr, pc, rr, rc)
    plain, swapped = ours.dpo(*right, beta), ours.dpo(*wrong, beta)
    # -log s(m) + log s(-m) = -m
    margin = ours.implicit_reward(right[0], right[2], beta) - ours.implicit_reward(right[1], right[3], beta)
    torch.testing.assert_close(plain - swapped, -margin, atol=1e-4, rtol=1e-4)
    mixed = (1 - smoothing) * plain + smoothing * swapped
    torch.testing.assert_close(ours.dpo(*right, beta, smoothing), mixed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.dpo(*right, beta, 0.5), ours.dpo(*wrong, beta, 0.5), atol=1e-5, rtol=1e-5)


def test_label_smoothing_reaches_the_losses_made_of_dpo() -> None:
    pc, pr, rc, rr = column(-20, -23, -21, -20)
    change = ours.dpo(pc, pr, rc, rr, 0.5, 0.2) - ours.dpo(pc, pr, rc, rr, 0.5)
    assert change.item() == pytest.approx(0.2 * 0.5 * 4)
    with_nll = [ours.dpo_nll(pc, pr, rc, rr, 0.5, 0.3, -pc, smoothing) for smoothing in (0.2, 0.0)]
    by_length = [ours.length_normalised_dpo(pc, pr, rc, rr, 0.5, smoothing) for smoothing in (0.2, 0.0)]
    for smoothed, plain in (with_nll, by_length):
        torch.testing.assert_close(smoothed - plain, change)


def test_names_of_arguments_are_one_vocabulary() -> None:
    """One loop calls them by name: with what each one's signature asks for."""
    vocabulary = {"pc", "pr", "rc", "rr", "nll_B", "beta", "tau", "gamma", "label_smoothing", "nll_coefficient", "discopop_tau"}
    for name, (loss, _) in ALL.items():
        assert set(inspect.signature(loss).parameters) <= vocabulary, name


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ALL)
def test_a_coefficient_that_is_not_above_0_is_refused(name: str, value: float) -> None:
    loss, settings = ALL[name]
    key = "tau" if "tau" in settings else "beta"
    given = {"pc": torch.zeros(1), "pr": torch.zeros(1), "rc": torch.zeros(1), "rr": torch.zeros(1), "nll_B": torch.zeros(1)}
    wanted = {one: given[one] for one in inspect.signature(loss).parameters if one in given}
    with pytest.raises(ValueError, match=f"{key} must be a number above 0, it is {value}"):
        loss(**wanted, **(settings | {key: value}))


ZERO = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.dpo(ZERO, ZERO, ZERO, ZERO, 0.1, 0.6), r"wrong, must be in \[0, 0.5\], it is 0.6"),
        (lambda: ours.simpo(ZERO, ZERO, 0.1, 0.0, -0.1), r"wrong, must be in \[0, 0.5\], it is -0.1"),
        (lambda: ours.robust_dpo(ZERO, ZERO, ZERO, ZERO, 0.1, 0.5), r"must be in \[0, 0.5\), it is 0.5"),
        (lambda: variants.exo(ZERO, ZERO, ZERO, ZERO, 0.1, 0.0), r"must be in \(0, 0.5\], it is 0.0: its log is in the loss"),
        (lambda: variants.discopop(ZERO, ZERO, ZERO, ZERO, 0.1, 1.5), r"discopop_tau must be in \(0, 1\], it is 1.5"),
        (lambda: ours.cpo(ZERO, ZERO, 0.1, -1.0, ZERO), "nll_coefficient must not be below 0, it is -1.0"),
        (lambda: ours.dpo_nll(ZERO, ZERO, ZERO, ZERO, 0.1, math.nan, ZERO), "nll_coefficient must not be below 0, it is nan"),
        (lambda: ours.kto(ZERO, ZERO, ZERO, 0.0, 0.0), "beta must be a number above 0"),
        (lambda: ours.kto(ZERO, ZERO, ZERO, 0.0, 0.1, 0.0), "w_desirable must be a number above 0"),
        (lambda: ours.kto(ZERO, ZERO, ZERO, 0.0, 0.1, 1.0, -1.0), "w_undesirable must be a number above 0"),
        (lambda: ours.kto_reference_point(ZERO, ZERO, -1.0), "beta must be a number above 0"),
        (lambda: ours.ranked_group(ZERO, ZERO, 0.0), "beta must be a number above 0"),
        (lambda: ours.two_d_dpo(*([ZERO[None]] * 6), beta=0.0, mask_BK=ZERO[None]), "beta must be a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
