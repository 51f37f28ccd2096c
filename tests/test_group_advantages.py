"""Group and process advantages: hand-worked numbers, loops written out, what a group leaves out."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.objectives.advantages import GroupScale, group_advantages, process_advantages, spread_B
from stages.objectives.preference import ranked_group
from stages.rollouts.groups import ordered_pairs, ranks

REWARDS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([-2.0, 0.0, 0.2, 0.5, 1.0, 1.2, 7.0]), st.booleans()), min_size=1, max_size=24
)


def tensors(members: list[tuple[int, float, bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups, rewards, valid = zip(*members, strict=True)
    return torch.tensor(rewards), torch.tensor(groups), torch.tensor(valid)


def test_a_group_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, sample deviation sqrt(1/3)."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    of_std = 0.5 / math.sqrt(1 / 3)
    assert group_advantages(rewards, groups).tolist() == pytest.approx([of_std, -of_std, -of_std, of_std], abs=1e-5)
    assert group_advantages(rewards, groups, "none").tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert group_advantages(rewards, groups, "rloo").tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [1.0, 0.0, 0.0, 0.5, 0.0, 0.0, -0.5, -1.0]),
        ("rloo", [1.5, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0, -1.5]),
        ("std", [1.0, 0.0, 0.0, math.sqrt(0.5), 0.0, 0.0, -math.sqrt(0.5), -1.0]),
    ],
)
def test_unequal_groups_one_of_one_and_one_without_spread(scale: GroupScale, expected: list[float]) -> None:
    """Group 0 has 3, 2, 1, group 1 has 1, 0, group 2 has 5 alone, and group 3 has 2, 2."""
    rewards, groups = [3.0, 2.0, 5.0, 1.0, 2.0, 2.0, 0.0, 1.0], [0, 0, 2, 1, 3, 3, 1, 0]
    assert group_advantages(torch.tensor(rewards), torch.tensor(groups), scale).tolist() == pytest.approx(expected, abs=1e-5)


@given(REWARDS)
def test_unequal_groups_against_a_loop(members: list[tuple[int, float, bool]]) -> None:
    rewards, groups, valid = tensors(members)
    found = {scale: group_advantages(rewards, groups, scale, valid).tolist() for scale in ("std", "none", "rloo")}
    for place, (group, reward, known) in enumerate(members):
        others = [r for g, r, v in members if g == group and v]
        if not known or len(set(others)) < 2:
            assert all(one[place] == 0 for one in found.values())
            continue
        mean, rest = statistics.mean(others), (sum(others) - reward) / (len(others) - 1)
        expected = {"std": (reward - mean) / (statistics.stdev(others) + 1e-6), "none": reward - mean, "rloo": reward - rest}
        assert {name: one[place] for name, one in found.items()} == pytest.approx(expected, abs=1e-5)


@given(REWARDS, st.randoms())
def test_order_has_no_say(members: list[tuple[int, float, bool]], random: object) -> None:
    order = sorted(range(len(members)), key=lambda _: random.random())  # pyright: ignore[reportAttributeAccessIssue]
    straight = group_advantages(*tensors(members)[:2], "std", tensors(members)[2])
    turned = tensors([members[i] for i in order])
    assert group_advantages(*turned[:2], "std", turned[2]).tolist() == pytest.approx([straight[i].item() for i in order])


def test_a_group_that_differs_by_rounding_gives_nothing() -> None:
    """A reward model scores equal completions in batches of other shapes: their last bits differ."""
    rewards, groups = torch.tensor([0.3, 0.3 + 6e-8, 0.3 - 6e-8, 150.0, 150.00002]), torch.tensor([0, 0, 0, 1, 1])
    assert spread_B(rewards, groups).tolist() == [False] * 5
    assert group_advantages(rewards, groups).tolist() == [0.0] * 5


def test_a_group_of_one_and_one_without_a_reward() -> None:
    rewards, groups = torch.tensor([3.0, math.nan, math.nan, 1.0, 0.0, math.nan]), torch.tensor([9, 5, 5, 7, 7, 7])
    found = group_advantages(rewards, groups, "none", ~rewards.isnan())
    assert found.tolist() == [0.0, 0.0, 0.0, 0.5, -0.5, 0.0]


def test_none_of_it_carries_gradient_and_an_unknown_scale_is_refused() -> None:
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_advantages(rewards, torch.tensor([0, 0])).requires_grad
    with pytest.raises(ValueError, match="std, none or rloo"):
        group_advantages(rewards, torch.tensor([0, 0]), "minmax")  # pyright: ignore[reportArgumentType]


def test_process_advantages_by_hand() -> None:
    """Scores 1, 0 | 1 of one group: mean 2/3, sample deviation sqrt(1/3); a token has the sum of the steps not yet ended."""
    found = process_advantages([[1.0, 0.0], [1.0]], [[1, 3], [2]], torch.tensor([4, 4]), 5)
    good, bad = (1 / 3) / math.sqrt(1 / 3), (-2 / 3) / math.sqrt(1 / 3)
    first = [good + bad, good + bad, bad, bad, 0.0]
    assert found.tolist()[0] == pytest.approx(first, abs=1e-5)
    assert found.tolist()[1] == pytest.approx([good, good, good, 0.0, 0.0], abs=1e-5)


def test_process_advantages_of_one_last_step_are_the_outcomes() -> None:
    rewards, groups = [0.3, 1.0, -0.5, 2.0, 2.5], torch.tensor([0, 0, 0, 1, 1])
    ends = [[3], [1], [0], [2], [3]]
    found = process_advantages([[one] for one in rewards], ends, groups, 4)
    outcome = group_advantages(torch.tensor(rewards), groups)
    for b, (end,) in enumerate(ends):
        assert found[b].tolist() == pytest.approx([outcome[b].item()] * (end + 1) + [0.0] * (3 - end))


@given(st.lists(st.lists(st.sampled_from([0.0, 0.4, 1.0]), max_size=4), min_size=1, max_size=5), st.integers(0, 1000))
def test_process_advantages_against_a_loop(scores: list[list[float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = [sorted(torch.randint(0, 7, (len(one),), generator=generator).tolist()) for one in scores]
    groups = torch.arange(len(scores)) % 2
    found = process_advantages(scores, ends, groups, 7)
    for b, own in enumerate(scores):
        every = [s for one, group in zip(scores, groups.tolist(), strict=True) for s in one if group == groups[b]]
        flat = len(set(every)) < 2
        mean, deviation = (0.0, 1.0) if flat else (statistics.mean(every), statistics.stdev(every) + 1e-6)
        for t in range(7):
            later = [0.0 if flat else (s - mean) / deviation for s, end in zip(own, ends[b], strict=True) if end >= t]
            assert found[b, t].item() == pytest.approx(sum(later), abs=1e-4)


@pytest.mark.parametrize("ends", [[[2, 1]], [[0]], [[0, 5]], [[-1, 0]]])
def test_steps_that_cannot_be_are_refused(ends: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sequence 0: 2 step scores with the ends"):
        process_advantages([[1.0, 0.0]], ends, torch.tensor([0]), 5)


def test_the_worked_pairs_of_a_ranked_group() -> None:
    """`worked-examples.txt` 4: the six losses sum to 52.41 (DESIGN 8); it names 2.63, 10.59 and 4.19."""
    logp, ranks = torch.tensor([-32.1, -67.4, -58.9, -18.2]), torch.tensor([3, 1, 2, 4])
    assert ranked_group(logp, ranks, 0.3).item() == pytest.approx(52.41, abs=0.005)
    for better, worse, loss in ((1, 2, 2.63), (1, 0, 10.59), (1, 3, 14.76), (2, 0, 8.04), (2, 3, 12.21), (0, 3, 4.19)):
        pair = torch.tensor([better, worse])
        assert ranked_group(logp[pair], torch.tensor([1, 2]), 0.3).item() == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize(
    ("rewards", "expected", "pairs"),
    [
        ([0.3, 1.0, -2.0, 0.3], [2, 1, 3, 2], 5),
        ([0.3 + 6e-8, 0.3, 0.3 - 6e-8], [1, 1, 1], 0),
        ([150.0, 150.00002, 149.9], [1, 1, 2], 2),
        ([1e-5, 2e-5], [2, 1], 1),
        ([7.0], [1], 0),
    ],
)
def test_rewards_that_differ_by_rounding_make_no_pair(rewards: list[float], expected: list[int], pairs: int) -> None:
    """A reward model scores equal completions in batches of other shapes: which is better must not be chance."""
    assert ranks(torch.tensor(rewards).double()).tolist() == expected
    assert ordered_pairs(torch.tensor(rewards).double()) == pairs


def test_ties_make_no_pair_and_gradients_push_apart() -> None:
    logp = torch.tensor([-3.0, -2.0, -4.0], requires_grad=True)
    assert ranked_group(logp, torch.tensor([1, 1, 1]), 0.5).item() == 0.0
    loss = ranked_group(logp, torch.tensor([1, 2, 2]), 0.5)
    (gradient,) = torch.autograd.grad(loss, logp)
    expected = [-0.5 * torch.sigmoid(torch.tensor(0.5 * gap)).item() for gap in (1.0, -1.0)]
    assert gradient.tolist() == pytest.approx([sum(expected), -expected[0], -expected[1]], abs=1e-6)
