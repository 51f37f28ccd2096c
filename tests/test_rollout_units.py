"""Completions in units that stay together, laid out by row, shared over processes, joined: against loops."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollouts import LENGTHS, PAD, Lengths, rollouts_of, tokens_of

from stages.data.batching import TokenBatch, pad
from stages.rollouts.batch import Rollouts
from stages.specs.base import Runtime


def some_units(count: int, seed: int) -> list[np.ndarray]:
    """Some of `count` completions, in any order, in units of one to four."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(count)[: rng.integers(1, count + 1)]
    return np.split(chosen, np.sort(rng.permutation(np.arange(1, len(chosen)))[: len(chosen) // 2]))


def whole_length(rollouts: Rollouts, index: int) -> int:
    return len(rollouts.ids(index))


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), budget=st.integers(1, 60), packed=st.booleans())
def test_a_unit_stays_together_within_the_budget(lengths: Lengths, seed: int, budget: int, packed: bool) -> None:
    rollouts, units = rollouts_of(lengths), some_units(len(lengths), seed)
    batches = rollouts.batches(units, budget, packed, PAD)
    assert sorted(index for batch in batches for index in batch.indices) == sorted(np.concatenate(units).tolist())
    for unit in units:
        [batch] = [batch for batch in batches if unit[0] in batch.indices]
        # One after the other, in the unit's own order.
        start = batch.indices.index(unit[0])
        assert batch.indices[start : start + len(unit)] == tuple(unit.tolist())
    for batch in batches:
        inside = [unit for unit in units if unit[0] in batch.indices]
        used = sum(whole_length(rollouts, index) for index in batch.indices) if packed else batch.ids_BT.numel()
        assert len(inside) == 1 or used <= budget
        assert batch.ids_BT[batch.ids_BT != PAD].tolist() == [t for index in batch.indices for t in rollouts.ids(index)]


def test_units_fill_a_batch_before_another_is_begun() -> None:
    rollouts = rollouts_of([(1, 4), (1, 3), (1, 2), (1, 1), (1, 2)])
    units = [np.array([3, 1]), np.array([0]), np.array([2, 4])]
    # Padded, every sequence is as wide as the longest, of 5 tokens: 5 of them, then 10 more, then 10 more.
    apart = [(0,), (3, 1), (2, 4)]
    for budget, found in ((25, [(0, 3, 1, 2, 4)]), (24, [(0, 3, 1), (2, 4)]), (14, apart), (1, apart)):
        assert [batch.indices for batch in rollouts.batches(units, budget, False, PAD)] == found
    # Single completions are units of one, as a list or an array.
    alone = [batch.indices for batch in rollouts.batches([2, 0], 100, False, PAD)]
    assert alone == [batch.indices for batch in rollouts.batches(np.array([2, 0]), 100, False, PAD)] == [(0, 2)]


# By row.


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), budget=st.integers(1, 60), packed=st.booleans())
def test_rows_are_completions_however_the_batch_is_laid_out(lengths: Lengths, seed: int, budget: int, packed: bool) -> None:
    rollouts = rollouts_of(lengths)
    for batch in rollouts.batches(some_units(len(lengths), seed), budget, packed, PAD):
        told = [rollouts.samples[index].completion.ids for index in batch.indices]
        width = max(map(len, told))
        expected = [ids + [0] * (width - len(ids)) for ids in told]
        assert rollouts.row_mask(batch).tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids in told]
        assert rollouts.row_mask(batch).dtype == torch.int64
        assert rollouts.rows("ids", batch).tolist() == expected
        assert rollouts.rows("ids", batch).dtype == torch.float32
        # What is outside the targets is not read, not even by the gradient.
        values_BT = torch.where(batch.target_BT == 1, batch.ids_BT.double(), math.nan).requires_grad_()
        rows_BT = rollouts.by_row(batch, values_BT)
        assert rows_BT.tolist() == expected
        assert rows_BT.dtype == torch.float64
        (rows_BT * rollouts.row_mask(batch) * 3).sum().backward()
        assert values_BT.grad is not None
        assert torch.equal(values_BT.grad, batch.target_BT * 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_a_completion_is_one_row_of_nothing(dtype: torch.dtype) -> None:
    rollouts = rollouts_of([(2, 3), (1, 4)])
    batch = pad([rollouts.ids(0)], [5], PAD, ())
    values_BT = torch.full((1, 5), math.nan, dtype=dtype).requires_grad_()
    rows_BT = rollouts.by_row(batch, values_BT)
    assert rollouts.row_mask(batch).tolist() == [[0]]
    assert rollouts.rows("ids", batch).tolist() == rows_BT.tolist() == [[0.0]]
    assert rows_BT.dtype == dtype
    rows_BT.sum().backward()
    assert values_BT.grad is not None
    assert not values_BT.grad.any()


# Shared over processes.


def shares(rollouts: Rollouts, units: Any, processes: int, **runtime: Any) -> list[list[TokenBatch]]:
    ranks: list[Any] = [SimpleNamespace(process_index=index, num_processes=processes) for index in range(processes)]
    return [rollouts.share(rank, units, Runtime(**runtime), PAD) for rank in ranks]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), budget=st.integers(1, 60), processes=st.integers(1, 4), packed=st.booleans())
def test_processes_have_every_unit_once(lengths: Lengths, seed: int, budget: int, processes: int, packed: bool) -> None:
    rollouts, units = rollouts_of(lengths), some_units(len(lengths), seed)
    for asked in (units, np.concatenate(units)):
        found = shares(rollouts, asked, processes, micro_batch_tokens=budget, packed=packed)
        held = [sorted(index for batch in batches for index in batch.indices) for batches in found]
        assert held == [sorted(np.hstack([[], *asked[rank::processes]]).tolist()) for rank in range(processes)]
        for batches, indices in zip(found, held, strict=True):
            assert {batch.attention_BT is None for batch in batches} == ({packed} if indices else {False})
            # A process without a completion has a batch as well, of which no token counts: all call the model alike.
            assert batches
            targets = sum(int(batch.target_BT.sum()) for batch in batches)
            assert targets == sum(lengths[index][1] for index in indices)


def test_a_share_without_completions_is_a_sequence_of_which_no_token_counts() -> None:
    rollouts = rollouts_of([(2, 3), (1, 4)])
    for units in ([], np.zeros(0, dtype=np.int64), [np.array([1])]):
        batch = shares(rollouts, units, 2)[1][0]
        assert batch.indices == ()
        assert batch.ids_BT.tolist() == [rollouts.ids(0).tolist()]
        assert not batch.target_BT.any()


# Groups, and more completions.


def test_groups_are_numbered_by_prompt_in_order_of_appearance() -> None:
    rollouts = rollouts_of([(1, 1)] * 7)
    for sample, name in zip(rollouts.samples, ["c", "a", "c", "b", "a", "c", "d"], strict=True):
        sample.row["id"] = name
    assert rollouts.groups_B.tolist() == [0, 1, 0, 2, 1, 0, 3]


@settings(max_examples=50, deadline=None)
@given(first=LENGTHS, second=LENGTHS)
def test_joined_completions_follow_one_another_with_what_is_known_of_each(first: Lengths, second: Lengths) -> None:
    ours, theirs = rollouts_of(first), rollouts_of(second)
    for rollouts, shift in ((ours, 0.0), (theirs, 100.0)):
        rollouts.each["reward"] = torch.arange(len(rollouts)).double() + shift
        rollouts.each["rewards.told"] = torch.full((len(rollouts),), math.nan).double()
    both = ours.joined(theirs)
    assert both.samples == [*ours.samples, *theirs.samples]
    assert both.lengths_B.tolist() == [*ours.lengths_B, *theirs.lengths_B]
    assert list(both.each) == ["reward", "rewards.told"]
    assert both.each["reward"].tolist() == [*range(len(ours)), *(100.0 + n for n in range(len(theirs)))]
    assert both.each["reward"].dtype == torch.float64
    assert bool(both.each["rewards.told"].isnan().all())
    # Numbers of tokens come later: of neither half alone are they known.
    assert both.tokens == {}
    both.tokens["ids"] = torch.cat([ours.tokens["ids"], theirs.tokens["ids"]])
    assert both.tokens["ids"][both.places([len(ours)])].tolist() == tokens_of(theirs, [0])
    # The halves are as they were; of prompts that come in both, groups are of both.
    assert (len(ours.each["reward"]), len(theirs.each["reward"])) == (len(ours), len(theirs))
    more = abs(len(ours) - len(theirs))
    assert both.groups_B.tolist() == [*range(len(ours)), *range(len(theirs))]
    assert len(set(both.groups_B.tolist())) == min(len(ours), len(theirs)) + more
