"""The divergence of two distributions by logits: against float64 sums written out, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.distillation import Direction, token_kl

DIRECTIONS: tuple[Direction, ...] = ("forward_kl", "reverse_kl")
both = pytest.mark.parametrize("direction", DIRECTIONS)


def by_hand(student: list[float], teacher: list[float], direction: Direction) -> float:
    """sum_v p(v) log(p(v) / q(v)) with plain floats; p is the teacher's for the forward KL."""
    probs = []
    for logits in (student, teacher):
        weights = [math.exp(one - max(logits)) for one in logits]
        probs.append([one / sum(weights) for one in weights])
    p, q = probs if direction == "reverse_kl" else reversed(probs)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@both
def test_by_hand(direction: Direction) -> None:
    """Teacher 3/4, 1/4; student 1/2, 1/2."""
    student_NV, teacher_NV = torch.tensor([[5.0, 5.0]]), torch.tensor([[math.log(3.0), 0.0]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    expected = forward if direction == "forward_kl" else backward
    assert token_kl(student_NV, teacher_NV, direction).tolist() == [pytest.approx(expected, abs=1e-6)]


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LOGITS, LOGITS), min_size=1, max_size=4), st.sampled_from(DIRECTIONS))
def test_each_token_has_the_sum_over_the_vocabulary(pairs: list[tuple[list[float], list[float]]], direction: Direction) -> None:
    students, teachers = zip(*pairs, strict=True)
    kl_N = token_kl(torch.tensor(students), torch.tensor(teachers), direction)
    assert kl_N.dtype == torch.float32
    assert kl_N.tolist() == pytest.approx([by_hand(*pair, direction) for pair in pairs], abs=1e-5, rel=1e-5)
    assert (kl_N >= -1e-6).all()
    # Logits are what they are up to a number added to all of a token's.
    shifted_N = token_kl(torch.tensor(students) + 3.0, torch.tensor(teachers) - 2.0, direction)
    assert shifted_N.tolist() == pytest.approx(kl_N.tolist(), abs=1e-5)


@both
def test_equal_distributions_are_at_no_distance(direction: Direction) -> None:
    logits_NV = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 5
    assert token_kl(logits_NV, logits_NV.clone(), direction).tolist() == pytest.approx([0.0] * 6, abs=1e-6)


@both
def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_teacher(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(1)
    student_NV, teacher_NV = (torch.randn(3, 7, generator=generator, requires_grad=True) for _ in range(2))
    weights_N = torch.tensor([1.0, -2.0, 0.5])
    (token_kl(student_NV, teacher_NV, direction) * weights_N).sum().backward()
    assert student_NV.grad is not None
    assert teacher_NV.grad is None
    step = 1e-5
    for n in range(3):
        for v in range(7):
            ends = []
            for sign in (1, -1):
                moved = student_NV[n].tolist()
                moved[v] += sign * step
                ends.append(by_hand(moved, teacher_NV[n].tolist(), direction))
            expected = float(weights_N[n]) * (ends[0] - ends[1]) / (2 * step)
            assert float(student_NV.grad[n, v]) == pytest.approx(expected, abs=1e-5)


@both
def test_columns_that_only_one_has_are_left_out(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(2)
    narrow_NV, wide_NV = torch.randn(4, 5, generator=generator), torch.randn(4, 8, generator=generator) + 3
    for student_NV, teacher_NV in ((narrow_NV, wide_NV), (wide_NV, narrow_NV)):
        found_N = token_kl(student_NV, teacher_NV, direction)
        cut_N = [by_hand(s[:5], t[:5], direction) for s, t in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)]
        assert found_N.tolist() == pytest.approx(cut_N, abs=1e-5)
    wide_NV.requires_grad_()
    token_kl(wide_NV, narrow_NV, direction).sum().backward()
    assert wide_NV.grad is not None
    assert not wide_NV.grad[:, 5:].any()
    assert wide_NV.grad[:, :5].any()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_the_type(direction: Direction, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    student_NV, teacher_NV = (torch.randn(50, 20, generator=generator).to(dtype) for _ in range(2))
    found_N = token_kl(student_NV, teacher_NV, direction)
    assert found_N.dtype == torch.float32
    # Exactly what the rounded logits give in float32: normalised in the narrow type it would be off by far more.
    assert torch.equal(found_N, token_kl(student_NV.float(), teacher_NV.float(), direction))
    expected = [by_hand(s, t, direction) for s, t in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)]
    assert found_N.tolist() == pytest.approx(expected, abs=1e-5)


@both
def test_a_certain_teacher_is_no_nan(direction: Direction) -> None:
    """float32 has log-probs where its probabilities are 0."""
    student_NV, teacher_NV = torch.zeros(1, 3, requires_grad=True), torch.tensor([[500.0, 0.0, 0.0]])
    kl_N = token_kl(student_NV, teacher_NV, direction)
    expected = math.log(3) if direction == "forward_kl" else 1000 / 3 - math.log(3)
    assert kl_N.tolist() == [pytest.approx(expected, rel=1e-5)]
    kl_N.sum().backward()
    assert student_NV.grad is not None
    assert student_NV.grad.isfinite().all()
