"""What the sources say of preference objectives: worked numbers, DPO's gradient, IPO's target, CPO's bound."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.objectives.preference import (
    cpo,
    dpo,
    implicit_reward,
    ipo,
    length_normalised_dpo,
    orpo,
    reference_free_dpo,
    robust_dpo,
    simpo,
    spin,
    two_d_dpo,
)

LOGP = st.floats(-60, 0, width=32)


def column(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_worked_example() -> None:
    """`worked-examples.txt` 3: a logit of .5 (-45.6 + 28.3) = -8.65, a loss of 8.65; its 8.62 is of a rounded probability."""
    (loss,) = reference_free_dpo(*column(-45.6, -28.3), beta=0.5).tolist()
    assert loss == pytest.approx(softplus(8.65), abs=1e-5)
    assert round(loss, 2) == 8.65
    assert round(-math.log(0.00018), 2) == 8.62


def test_the_reference_free_form_is_dpo_with_a_reference_that_does_not_care() -> None:
    pc, pr = column(-45.6, -28.3)
    assert dpo(pc, pr, torch.tensor([-30.0]), torch.tensor([-30.0]), 0.5).item() == pytest.approx(8.65, abs=5e-3)


def test_spin_by_hand() -> None:
    """The demonstration gained 2 nats over the last policy, its own sample lost 3: .1 x 5 = .5."""
    assert spin(*column(-18, -33, -20, -30), beta=0.1).item() == pytest.approx(softplus(-0.5), abs=1e-6)


def test_a_curriculum_starts_each_stage_at_log_2() -> None:
    """Curry-DPO (80): stage 2's reference is stage 1's policy; from the first one the loss would be another.

    As printed, with the parenthesis misplaced, the second term is outside the sigmoid (DESIGN 8): another number again.
    """
    first, after_one, after_two = (-20.0, -22.0), (-18.0, -24.0), (-17.0, -24.5)
    assert dpo(*column(*after_one, *first), beta=0.5).item() == pytest.approx(softplus(-0.5 * (2 + 2)), abs=1e-6)
    assert dpo(*column(*after_one, *after_one), beta=0.5).item() == pytest.approx(math.log(2), abs=1e-6)
    found = dpo(*column(*after_two, *after_one), beta=0.5).item()
    assert found == pytest.approx(softplus(-0.5 * (1 + 0.5)), abs=1e-6)
    assert found != pytest.approx(softplus(-0.5 * (3 + 2.5)), abs=1e-2)
    printed = softplus(-0.5 * 1) + 0.5 * -0.5
    assert found != pytest.approx(printed, abs=1e-2)


def test_two_segments_by_hand() -> None:
    """Segment 1: .5 (2 x 1 - 1 x -2) = 2. Segment 2: .5 (-1 x 3 - 4 x .5) = -2.5. The third is not there."""
    pc, rc = torch.tensor([[-4.0, -2.0, math.nan]]), torch.tensor([[-5.0, -5.0, 1.0]])
    pr, rr = torch.tensor([[-6.0, -1.0, 2.0]]), torch.tensor([[-4.0, -1.5, math.nan]])
    wc, wr = torch.tensor([[2.0, -1.0, math.nan]]), torch.tensor([[1.0, 4.0, 9.0]])
    pc.requires_grad_()
    losses = two_d_dpo(pc, pr, rc, rr, wc, wr, 0.5, torch.tensor([[1, 1, 0]]))
    assert losses.tolist() == pytest.approx([softplus(-2) + softplus(2.5)], abs=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), pc)
    expected = [-0.5 * 2 / (1 + math.exp(2)), 0.5 * 1 / (1 + math.exp(-2.5)), 0.0]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert two_d_dpo(pc, pr, rc, rr, wc, wr, 0.5, torch.zeros(1, 3)).tolist() == [0.0]


@given(st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP), min_size=1, max_size=4), st.sampled_from([0.05, 0.3, 1.0]))
def test_one_segment_of_unit_weight_is_dpo(pairs: list[tuple[float, ...]], beta: float) -> None:
    columns = torch.tensor(pairs).T
    ones = torch.ones(len(pairs), 1)
    segments = two_d_dpo(*columns[..., None], wc_BK=ones, wr_BK=ones, beta=beta, mask_BK=ones)
    torch.testing.assert_close(segments, dpo(*columns, beta=beta))


@given(LOGP, LOGP, st.floats(-60, 0), st.sampled_from([0.05, 0.5, 1.0]))
def test_cpo_bounds_dpo_with_a_perfect_reference(chosen: float, rejected: float, perfect: float, beta: float) -> None:
    """5.3.2: pi_w(chosen) = 1, pi_w(rejected) <= 1; then DPO + beta log pi_w(rejected) <= CPO's preference loss."""
    pc, pr, rc, rr = column(chosen, rejected, 0.0, perfect)
    bound, exact = reference_free_dpo(pc, pr, beta), dpo(pc, pr, rc, rr, beta) + beta * rr
    assert (exact <= bound + 1e-5).all()
    torch.testing.assert_close(dpo(pc, pr, rc, torch.zeros(1), beta), bound)


def test_the_bound_is_not_tight_for_a_reference_that_tells_them_apart() -> None:
    pc, pr, rc, rr = column(-10, -12, 0, -20)
    assert (dpo(pc, pr, rc, rr, 1.0) + rr).item() < reference_free_dpo(pc, pr, 1.0).item() - 0.1


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_stops_at_its_target_where_dpo_goes_on(tau: float) -> None:
    """h = 1/(2 tau): no loss, no gradient; on either side of it a pull back. DPO pushes at any margin (5.2.9)."""
    target = 1 / (2 * tau)
    pc = torch.tensor([target - 0.5, target, target + 0.5], requires_grad=True)
    zeros = torch.zeros(3)
    losses = ipo(pc - 3, zeros - 1, zeros - 3, zeros - 1, tau)
    assert losses.tolist() == pytest.approx([0.25, 0.0, 0.25], abs=1e-5)
    assert torch.autograd.grad(losses.sum(), pc)[0].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)
    assert (torch.autograd.grad(dpo(pc, zeros, zeros, zeros, tau).sum(), pc)[0] < 0).all()


class Policy(NamedTuple):
    """Chosen is the first, rejected the second of five completions, whose probabilities are a softmax."""

    logits: torch.Tensor
    reference: torch.Tensor

    def loss(self, logits: torch.Tensor, beta: float) -> torch.Tensor:
        logp, ref = logits.log_softmax(-1), self.reference.log_softmax(-1)
        return dpo(logp[:1], logp[1:2], ref[:1], ref[1:2], beta).sum()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_dpo_is_equation_47(beta: float, seed: int) -> None:
    """-beta sigmoid(r(rejected) - r(chosen)) (grad log pi(chosen) - grad log pi(rejected)), by every logit."""
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(2 * torch.randn(5, generator=generator), 2 * torch.randn(5, generator=generator))
    logits = policy.logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(policy.loss(logits, beta), logits)
    step = 0.02
    differences = [
        (policy.loss(policy.logits + step * one, beta) - policy.loss(policy.logits - step * one, beta)) / (2 * step)
        for one in torch.eye(5)
    ]
    probabilities, ratios = policy.logits.softmax(-1), policy.logits.log_softmax(-1) - policy.reference.log_softmax(-1)
    of_chosen, of_rejected = torch.eye(5)[0] - probabilities, torch.eye(5)[1] - probabilities
    weight = torch.sigmoid(beta * (ratios[1] - ratios[0]))
    torch.testing.assert_close(found, -beta * weight * (of_chosen - of_rejected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, torch.stack(differences), atol=2e-4, rtol=0)


def test_the_implicit_reward_by_hand() -> None:
    assert implicit_reward(*column(-12, -20), beta=0.25).item() == pytest.approx(2.0)


def test_means_a_token_by_hand() -> None:
    """Means of -.5 and -1.5 a token, the reference's -.7 and -1.2. Odds: exp(-.5) is .6065, exp(-1.5) .2231."""
    pc, pr, rc, rr = column(-0.5, -1.5, -0.7, -1.2)
    assert length_normalised_dpo(pc, pr, rc, rr, 5).item() == pytest.approx(softplus(-5 * (0.2 + 0.3)), abs=1e-5)
    assert ipo(pc, pr, rc, rr, 0.5).item() == pytest.approx((0.5 - 1) ** 2, abs=1e-5)
    assert simpo(pc, pr, 2.0, 0.5).item() == pytest.approx(softplus(-(2 * 1 - 0.5)), abs=1e-5)
    odds = [math.exp(one) / (1 - math.exp(one)) for one in (-0.5, -1.5)]
    assert orpo(pc, pr, 0.1).item() == pytest.approx(0.5 + 0.1 * math.log1p(odds[1] / odds[0]), abs=1e-5)


def test_cpo_by_hand() -> None:
    found = cpo(*column(-45.6, -28.3), beta=0.5, nll_coefficient=0.1, nll_B=torch.tensor([45.6]))
    assert found.item() == pytest.approx(softplus(8.65) + 4.56, abs=1e-4)


@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.0, 0.45), st.sampled_from([0.1, 0.5]))
def test_robust_dpo_is_dpo_on_clean_labels_in_expectation(
    pc: float, pr: float, rc: float, rr: float, flipped: float, beta: float
) -> None:
    """Arxiv 2403.00409: over labels that are flipped with chance e, the mean of the robust loss is that of the clean labels."""
    right, wrong = column(pc, pr, rc, rr), column(pr, pc, rr, rc)
    mean = (1 - flipped) * robust_dpo(*right, beta=beta, label_smoothing=flipped) + flipped * robust_dpo(
        *wrong, beta=beta, label_smoothing=flipped
    )
    torch.testing.assert_close(mean, dpo(*right, beta=beta), atol=2e-4, rtol=1e-4)
