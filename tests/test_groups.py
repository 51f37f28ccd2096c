"""What the completions of one prompt are to each other, against loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_rollouts import PAD, rollouts_of

from stages.data.batching import pad
from stages.objectives.advantages import process_advantages
from stages.rollouts import groups
from stages.rollouts.batch import Rollouts
from stages.specs.grpo import GrpoConfig

NAN = math.nan
# Few values, so that ties, groups without spread and missing rewards are common.
REWARDS = st.sampled_from([0.0, 1.0, -2.0, NAN])
MEMBERS = st.lists(st.tuples(st.integers(0, 3), REWARDS, st.integers(1, 4)), min_size=1, max_size=10)
Members = list[tuple[int, float, int]]


def rollouts_with(members: Members) -> Rollouts:
    """Completions of (prompt, reward, length); every other one was cut off."""
    rollouts = rollouts_of([(1, length) for _, _, length in members])
    for sample, (prompt, _, _) in zip(rollouts.samples, members, strict=True):
        sample.row["id"] = f"prompt {prompt}"
    rollouts.each["reward"] = torch.tensor([reward for _, reward, _ in members], dtype=torch.float64)
    return rollouts


def config_of(**changes: Any) -> GrpoConfig:
    return GrpoConfig.model_validate({"rewards": [{"name": "format"}]} | changes)


def spread(members: Members) -> list[bool]:
    """Which have a reward, and another of their prompt one that differs."""
    return [not math.isnan(r) and any(q == p and s != r and not math.isnan(s) for q, s, _ in members) for p, r, _ in members]


def groups_named(members: Members) -> list[int]:
    order = list(dict.fromkeys(prompt for prompt, _, _ in members))
    return [order.index(prompt) for prompt, _, _ in members]


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS)
def test_which_groups_have_spread(members: Members) -> None:
    rollouts = rollouts_with(members)
    assert rollouts.groups_B.tolist() == groups_named(members)
    assert groups.with_spread(config_of(), rollouts).tolist() == spread(members)
    prompts = {prompt for prompt, _, _ in members}
    taught = {prompt for (prompt, _, _), one in zip(members, spread(members), strict=True) if one}
    assert groups.group_metrics(config_of(), rollouts) == {
        "groups": len(prompts),
        "groups_without_spread": len(prompts - taught),
        "rewards_missing": sum(math.isnan(reward) for _, reward, _ in members),
    }


PROCESS = {"supervision": "process"}
# Of each completion: its prompt, its reward, its steps' scores.
STEPPED: list[tuple[int, float, list[float]]] = [
    (0, 1.0, [0.5, 0.5]), (0, 0.5, [0.5]),  # rewards differ, steps do not
    (1, 1.0, [0.75, 0.25]), (1, 1.0, [0.5, 0.5]),  # steps differ, rewards do not
    (2, 1.0, [1.0, 0.0]),  # alone, with steps that differ
    (3, 1.0, [1.0]), (3, NAN, []), (3, 2.0, [1.0 + 1e-9]),  # by rounding
    (4, 1.0, [1.0, 0.0]), (4, NAN, []), (4, 1.0, []),  # one without a reward, one without steps
    (5, 1.0, []), (5, 2.0, []),
]  # fmt: skip


def test_under_process_supervision_spread_is_that_of_steps() -> None:
    rollouts = rollouts_with([(prompt, reward, 2) for prompt, reward, _ in STEPPED])
    rollouts.steps = [[(place, score) for place, score in enumerate(scores)] for _, _, scores in STEPPED]
    taught = {1, 2, 4}
    found = groups.with_spread(config_of(**PROCESS), rollouts).tolist()
    assert found == [prompt in taught and not math.isnan(reward) for prompt, reward, _ in STEPPED]
    assert groups.group_metrics(config_of(**PROCESS), rollouts) == {
        "groups": 6,
        "groups_without_spread": 3,
        "rewards_missing": 2,
    }
    # What has spread is what has advantages: those of its steps.
    scores, ends = [scores for *_, scores in STEPPED], [list(range(len(scores))) for *_, scores in STEPPED]
    advantages_BT = process_advantages(scores, ends, torch.from_numpy(rollouts.groups_B), 2)
    assert set(rollouts.groups_B[advantages_BT.abs().sum(-1) > 0].tolist()) == taught
    # Dynamic sampling then keeps these.
    config = config_of(**PROCESS, refill={"rounds": 1})
    assert np.flatnonzero(groups.counted(config, rollouts)).tolist() == np.flatnonzero(found).tolist()
    assert groups.with_spread(config_of(), rollouts).tolist() == [prompt in (0, 3, 5) and r == r for prompt, r, _ in STEPPED]


def test_a_step_of_nothing_but_completions_without_steps_has_no_spread() -> None:
    rollouts = rollouts_with([(0, NAN, 1), (0, NAN, 1)])
    rollouts.steps = [[], []]
    assert groups.with_spread(config_of(**PROCESS), rollouts).tolist() == [False, False]


def test_rewards_that_differ_by_rounding_are_no_spread() -> None:
    rollouts = rollouts_with([(0, 1000.0, 1), (0, 1000.0 + 1e-4, 1), (1, 0.0, 1), (1, 1e-4, 1)])
    assert groups.with_spread(config_of(), rollouts).tolist() == [False, False, True, True]


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS, seed=st.integers(0, 99))
def test_some_completions_by_group(members: Members, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(members))[: rng.integers(0, len(members) + 1)]
    found = groups.by_group(rollouts_with(members), chosen)
    named = groups_named(members)
    # Groups in order of their first appearance in the step; members in the order given.
    expected = [[i for i in chosen.tolist() if named[i] == group] for group in sorted({named[i] for i in chosen.tolist()})]
    assert [unit.tolist() for unit in found] == expected


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS, count=st.integers(1, 5), refill=st.booleans(), epoch=st.integers(0, 3))
def test_minibatches_hold_whole_groups_of_what_counts(members: Members, count: int, refill: bool, epoch: int) -> None:
    rollouts, config = rollouts_with(members), config_of(prompts=5, minibatches=count, refill={"rounds": int(refill)})
    found = groups.minibatches(config, rollouts, 3, epoch)
    assert len(found) == count
    counting = spread(members) if refill else [not math.isnan(reward) for _, reward, _ in members]
    assert sorted(index for one in found for index in one.tolist()) == np.flatnonzero(counting).tolist()
    named = groups_named(members)
    held = [{named[index] for index in one.tolist()} for one in found]
    assert sum(map(len, held)) == len({group for group, one in zip(named, counting, strict=True) if one})
    assert max(map(len, held)) - min(map(len, held)) <= 1
    again = groups.minibatches(config, rollouts, 3, epoch)
    assert [one.tolist() for one in again] == [one.tolist() for one in found]


def test_every_pass_of_every_step_has_its_own_order() -> None:
    rollouts = rollouts_with([(prompt, 0.0, 1) for prompt in range(12) for _ in range(2)])
    names = [(seed, step, epoch) for seed in range(3) for step in range(3) for epoch in range(3)]
    orders = {
        str([one.tolist() for one in groups.minibatches(config_of(seed=seed, minibatches=4), rollouts, step, epoch)])
        for seed, step, epoch in names
    }
    assert len(orders) == len(names)


# Pairs.


@settings(max_examples=100, deadline=None)
@given(rewards=st.lists(st.sampled_from([0.0, 1.0, -2.0, 3.0]), min_size=1, max_size=6))
def test_pairs_with_an_order_are_counted_once(rewards: list[float]) -> None:
    count = sum(a > b for a, b in permutations(rewards, 2))
    assert groups.ordered_pairs(torch.tensor(rewards, dtype=torch.float64)) == count


def pair_loss(members: Members, logps: Sequence[float], beta: float, chosen: Sequence[int]) -> float:
    """-log sigmoid(beta (log pi_i - log pi_j)) over all pairs of a prompt with r_i > r_j."""
    pairs = [(i, j) for i, j in permutations(chosen, 2) if members[i][0] == members[j][0] and members[i][1] > members[j][1]]
    return sum(math.log1p(math.exp(-beta * (logps[i] - logps[j]))) for i, j in pairs)


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS, seed=st.integers(0, 99), beta=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_loss_of_pairs_is_that_of_a_loop(members: Members, seed: int, beta: float) -> None:
    rollouts, rng = rollouts_with(members), np.random.default_rng(seed)
    known = [index for index, (_, reward, _) in enumerate(members) if not math.isnan(reward)]
    assume(known)
    chosen = rng.permutation(known)[: rng.integers(1, len(known) + 1)].tolist()
    [batch] = rollouts.batches([np.array(chosen)], 1000, False, PAD)
    logp_BT = -torch.from_numpy(rng.random(rollouts.row_mask(batch).shape)) * rollouts.row_mask(batch)
    logps = dict(zip(batch.indices, logp_BT.sum(-1).tolist(), strict=True))
    loss = groups.ranked_pairs(rollouts, batch, logp_BT.requires_grad_(), beta)
    expected = pair_loss(members, [logps.get(index, NAN) for index in range(len(members))], beta, chosen)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
    loss.backward()
    # Whatever has a pair is pushed, the better up, the worse down; nothing else is.
    assert logp_BT.grad is not None
    for row, index in enumerate(batch.indices):
        prompt, reward, length = members[index]
        rivals = [members[other][1] for other in chosen if members[other][0] == prompt]
        better, worse = any(reward > one for one in rivals), any(reward < one for one in rivals)
        pushed = logp_BT.grad[row, :length]
        if better != worse:
            assert bool((pushed < 0).all() if better else (pushed > 0).all())
        assert better or worse or not pushed.any()


def test_a_batch_without_a_completion_has_no_pairs_and_lets_gradients_flow() -> None:
    rollouts = rollouts_with([(0, 1.0, 3), (0, 0.0, 3)])
    batch = pad([rollouts.ids(0)], [4], PAD, ())
    parameter = torch.ones(1, 4, requires_grad=True)
    loss = groups.ranked_pairs(rollouts, batch, rollouts.by_row(batch, parameter * 2), 0.5)
    assert float(loss.detach()) == 0
    loss.backward()
    assert parameter.grad is not None
    assert not parameter.grad.any()


# What a loss is a mean of.

# Prompt, reward, advantage: a group with spread, one without, one with a single reward, one that is alone, one with a
# completion of advantage 0 (its reward is the group's mean). Every other one was cut off, the first of all included.
STEP = [
    (0, 1.0, 1.0), (0, 0.0, -1.0), (0, NAN, 0.0),
    (1, 1.0, 0.0), (1, 1.0, 0.0),
    (2, NAN, 0.0), (2, 5.0, 0.0),
    (3, 2.0, 0.0),
    (4, 0.0, -1.0), (4, 1.0, 0.0), (4, 2.0, 1.0),
]  # fmt: skip
CUT = {0, 2, 4, 6, 8, 10}
KNOWN = {0, 1, 3, 4, 6, 7, 8, 9, 10}
SPREAD = {0, 1, 8, 9, 10}
MOVED = {0, 1, 8, 10}
KL = {"coefficient": 0.1}


@pytest.fixture
def step() -> Rollouts:
    rollouts = rollouts_with([(prompt, reward, place % 3 + 1) for place, (prompt, reward, _) in enumerate(STEP)])
    each = torch.tensor([advantage for _, _, advantage in STEP])
    rollouts.keep("advantages", each[:, None].expand(-1, 3))
    assert set(np.flatnonzero(rollouts.truncated_B).tolist()) == CUT
    return rollouts


@pytest.mark.parametrize(
    ("changes", "counted", "taught"),
    [
        ({}, KNOWN, MOVED),
        ({"scale": "none", "supervision": "process"}, KNOWN, MOVED),
        ({"truncation": {"how": "penalise"}}, KNOWN, MOVED),
        ({"truncation": {"how": "mask"}}, KNOWN - CUT, MOVED - CUT),
        # Other prompts have taken the place of groups without spread.
        ({"refill": {"rounds": 1}}, SPREAD, MOVED),
        ({"refill": {"rounds": 1}, "truncation": {"how": "mask"}}, SPREAD - CUT, MOVED - CUT),
        # The KL penalty holds all of them, the one in the reward before there are advantages.
        ({"reference_kl": KL}, KNOWN, KNOWN),
        ({"reference_kl": KL | {"place": "reward"}}, KNOWN, KNOWN),
        ({"reference_kl": {"coefficient": 0.0, "place": "reward"}}, KNOWN, MOVED),
        ({"reference_kl": KL, "refill": {"rounds": 2}}, SPREAD, SPREAD),
        ({"reference_kl": KL, "truncation": {"how": "mask"}}, KNOWN - CUT, KNOWN - CUT),
        # Pairs are by reward: a completion between two others is in a pair with each.
        ({"objective": "ranked_pairs"}, KNOWN, SPREAD),
        ({"objective": "ranked_pairs", "truncation": {"how": "mask"}}, KNOWN - CUT, SPREAD - CUT),
        ({"objective": "ranked_pairs", "reference_kl": KL}, KNOWN, KNOWN),
    ],
)
def test_which_completions_count_and_which_teach(
    step: Rollouts, changes: dict[str, Any], counted: set[int], taught: set[int]
) -> None:
    config = config_of(**changes)
    assert set(np.flatnonzero(groups.counted(config, step)).tolist()) == counted
    assert set(np.flatnonzero(groups.taught(config, step)).tolist()) == taught


def test_an_advantage_at_any_token_teaches(step: Rollouts) -> None:
    """Under process supervision, the advantages of a completion may even cancel."""
    step.tokens["advantages"].zero_()
    step.tokens["advantages"][step.starts_B[4] : step.starts_B[5]] = torch.tensor([1.0, -1.0])
    assert np.flatnonzero(groups.taught(config_of(), step)).tolist() == [4]


@pytest.mark.parametrize(("aggregate", "mean"), [("sequence", 5), ("token", 2 + 3 + 2 + 3 + 1), ("constant", 5 * 7)])
def test_what_sums_are_divided_by(step: Rollouts, aggregate: str, mean: int) -> None:
    config = config_of(aggregate=aggregate, sampling={"max_new_tokens": 7})
    counted, chosen = np.array([1, 2, 4, 8, 9]), np.array([0, 1, 3, 4, 8, 9, 10])
    totals = groups.Totals(config, step, counted, chosen)
    lengths = [step.lengths_B[index] for index in chosen]
    assert (totals.mean, totals.run, totals.pairs) == (mean, sum(lengths), 1 + 0 + 3)
    # Of the chosen only.
    assert groups.Totals(config, step, counted, np.array([8, 1, 10])).pairs == 1
    assert groups.Totals(config, step, counted, np.array([0, 9, 10, 1])).pairs == 2


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_an_empty_minibatch_divides_by_1(step: Rollouts, aggregate: str) -> None:
    none = np.zeros(0, dtype=np.int64)
    totals = groups.Totals(config_of(aggregate=aggregate), step, none, none)
    assert (totals.mean, totals.run, totals.pairs) == (1, 1, 1)
