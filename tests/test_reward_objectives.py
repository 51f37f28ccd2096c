"""Bradley-Terry, rankings and labelled steps: values by hand, translation invariance, ties, margins."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from stages.objectives.reward import bradley_terry, ranking, step_loss


def test_bradley_terry_by_hand() -> None:
    losses = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)], abs=1e-6)


def test_only_differences_matter() -> None:
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bradley_terry(chosen + 3, rejected + 3), bradley_terry(chosen, rejected))


def test_a_margin_is_a_handicap() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.5])
    torch.testing.assert_close(bradley_terry(chosen, rejected, torch.tensor([1.0])), bradley_terry(chosen - 1, rejected))


def test_extreme_scores_stay_finite() -> None:
    assert bradley_terry(torch.tensor([-200.0]), torch.tensor([200.0])).item() == pytest.approx(400)


def test_bfloat16_scores_give_float32_losses() -> None:
    assert bradley_terry(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_ranking_is_the_mean_over_its_ordered_pairs() -> None:
    scores, ranks = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([2, 3, 1, 2])
    pairs = [(a, b) if ranks[a] < ranks[b] else (b, a) for a, b in combinations(range(4), 2) if ranks[a] != ranks[b]]
    expected = torch.stack([-F.logsigmoid(scores[a] - scores[b]) for a, b in pairs]).mean()
    assert len(pairs) == 5
    torch.testing.assert_close(ranking(scores, ranks), expected)


def test_a_pair_is_a_ranking_of_two_and_ties_are_nothing() -> None:
    scores = torch.tensor([0.2, 0.9], requires_grad=True)
    torch.testing.assert_close(ranking(scores, torch.tensor([1, 2])), bradley_terry(scores[:1], scores[1:])[0])
    tied = ranking(scores, torch.tensor([1, 1]))
    assert tied.item() == 0
    assert not torch.autograd.grad(tied, scores)[0].any()


# Steps.


def test_step_loss_by_hand() -> None:
    scores, labels = torch.tensor([0.0, 2.0, -1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 0.25])
    losses = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))]
    losses.append(0.25 * math.log(1 + math.exp(-3)) + 0.75 * math.log(1 + math.exp(3)))
    assert step_loss(scores, labels).item() == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert step_loss(scores, labels, total=10).item() == pytest.approx(sum(losses) / 10, abs=1e-6)


def test_step_loss_is_cross_entropy_of_two_logits_with_its_gradient() -> None:
    """As TRL's PRMTrainer has it, whose logits are (wrong, right)."""
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = F.cross_entropy(torch.stack([torch.zeros(6), scores], -1), labels)
    loss = step_loss(scores, labels.float())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, scores)[0] for one in (loss, expected)))


def test_parts_of_a_batch_add_up_to_it() -> None:
    scores, labels = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    labels = labels.sigmoid()
    parts = [step_loss(scores[a:b], labels[a:b], total=9) for a, b in ((0, 4), (4, 4), (4, 9))]
    torch.testing.assert_close(torch.stack(parts).sum(), step_loss(scores, labels))


def test_without_a_step_gradients_flow_and_are_zero() -> None:
    scores = torch.ones(3, requires_grad=True)
    loss = step_loss(scores[:0], torch.ones(0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, scores)[0].tolist() == [0, 0, 0]


def test_extreme_and_rounded_steps() -> None:
    assert step_loss(torch.tensor([-200.0]), torch.tensor([1.0])).item() == pytest.approx(200)
    rounded = step_loss(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    assert rounded.dtype == torch.float32
