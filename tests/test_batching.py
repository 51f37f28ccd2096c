"""Which rows a step takes and how they lie in memory: every target counted once, whatever the cut."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.batching import RowOrder, TokenBatch, first_target, micro_batches, pack, pad, split_by_length, target_count
from stages.data.tokens import TokenTable

LossOn = Literal["completion", "all"]
LOSS_ON: tuple[LossOn, ...] = ("completion", "all")
PAD = 0
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=15)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[list[int], int, int]]:
    """(ids, prompt length, row) triples: prompts may be empty, and completions too (a prompt cut at the limit)."""
    made = []
    for number, length in enumerate(draw(LENGTHS)):
        made.append(
            (draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)), draw(st.integers(0, length)), number)
        )
    return made


def table_of(made: list[tuple[list[int], int, int]]) -> TokenTable:
    with TemporaryDirectory() as folder:
        TokenTable.write(Path(folder) / "table.arrow", made)
        return TokenTable(Path(folder) / "table.arrow")


def targets(made: list[tuple[list[int], int, int]], loss_on: LossOn) -> list[list[int]]:
    """The tokens that carry loss, spelled out: never the first, and with `completion` none of the prompt."""
    return [
        [t for place, t in enumerate(ids) if place > 0 and (loss_on == "all" or place >= prompt)] for ids, prompt, _ in made
    ]


def laid_out(batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each sequence of a batch, found by the positions and the attention alone."""
    found: list[tuple[list[int], list[int]]] = []
    for b in range(batch.ids_BT.shape[0]):
        for t in range(batch.ids_BT.shape[1]):
            if batch.attention_BT is not None and not batch.attention_BT[b, t]:
                assert batch.ids_BT[b, t] == PAD
                assert not batch.target_BT[b, t]
                continue
            if batch.position_ids_BT[b, t] == 0:
                found.append(([], []))
            assert len(found[-1][0]) == batch.position_ids_BT[b, t]
            found[-1][0].append(int(batch.ids_BT[b, t]))
            if batch.target_BT[b, t]:
                found[-1][1].append(int(batch.ids_BT[b, t]))
    return found


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(0, 2**32), st.integers(0, 4))
def test_every_epoch_is_a_permutation_of_its_own(rows: int, seed: int, epoch: int) -> None:
    order = RowOrder(rows, seed)
    taken = order.take(epoch * rows, rows)
    assert taken.dtype == np.int64
    assert sorted(taken.tolist()) == list(range(rows))
    assert taken.tolist() == RowOrder(rows, seed).take(epoch * rows, rows).tolist()


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_a_stream_does_not_depend_on_how_it_is_taken(rows: int, seed: int, start: int, count: int, shuffle: bool) -> None:
    whole = RowOrder(rows, seed, shuffle).take(0, start + count).tolist()
    order = RowOrder(rows, seed, shuffle)
    assert order.take(start, count).tolist() == whole[start:]
    assert [int(order.take(place, 1)[0]) for place in range(start + count)] == whole
    if not shuffle:
        assert whole == [place % rows for place in range(start + count)]


def test_epochs_and_seeds_differ_and_the_global_generator_does_not_matter() -> None:
    np.random.seed(0)
    orders = [RowOrder(20, seed).take(epoch * 20, 20).tolist() for seed in (0, 1) for epoch in (0, 1)]
    np.random.seed(1)
    assert [RowOrder(20, seed).take(epoch * 20, 20).tolist() for seed in (0, 1) for epoch in (0, 1)] == orders
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 40), st.booleans())
def test_a_split_covers_each_place_once_within_the_limit(lengths: list[int], max_tokens: int, packed: bool) -> None:
    groups = split_by_length(lengths, max_tokens, packed)
    assert Counter(place for group in groups for place in group) == Counter(range(len(lengths)))
    costs = []
    for group in groups:
        taken = [lengths[place] for place in group]
        costs.append(sum(taken) if packed else max(taken) * len(taken))
        assert costs[-1] <= max_tokens or len(group) == 1
        assert taken == sorted(taken, reverse=True)
    # No cut without need: the longest sequence of a group would not have fitted into the group before it.
    for cost, group, following in zip(costs, groups, groups[1:], strict=False):
        first = lengths[following[0]]
        assert (cost + first if packed else max(lengths[place] for place in group) * (len(group) + 1)) > max_tokens


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 60), st.booleans(), st.data())
def test_a_split_keeps_together_what_counts_as_one(
    lengths: list[int], max_tokens: int, packed: bool, data: st.DataObject
) -> None:
    """A place that stands for several sequences takes the room of all of them, each as long as the longest."""
    counts = data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))
    groups = split_by_length(lengths, max_tokens, packed, counts)
    assert Counter(place for group in groups for place in group) == Counter(range(len(lengths)))

    def cost(group: list[int]) -> int:
        widths = [lengths[place] if packed else max(lengths[one] for one in group) for place in group]
        return sum(width * counts[place] for width, place in zip(widths, group, strict=True))

    for group in groups:
        assert cost(group) <= max_tokens or len(group) == 1
        assert [lengths[place] for place in group] == sorted((lengths[place] for place in group), reverse=True)
    for group, following in pairwise(groups):
        assert cost([*group, following[0]]) > max_tokens, "no cut without need"
    ones = split_by_length(lengths, max_tokens, packed, [1] * len(lengths))
    assert ones == split_by_length(lengths, max_tokens, packed)


def test_a_split_with_counts_by_hand() -> None:
    assert split_by_length([3, 1, 5, 2], max_tokens=15, counts=[2, 3, 1, 1]) == [[2, 0], [3, 1]]
    assert split_by_length([3, 1, 5, 2], max_tokens=15, packed=True, counts=[2, 3, 1, 1]) == [[2, 0, 3], [1]]
    assert split_by_length([4, 3, 2], max_tokens=8, counts=[2, 1, 1]) == [[0], [1, 2]]
    assert split_by_length([2, 2], max_tokens=9, counts=[5, 4]) == [[0], [1]]
    assert split_by_length([2, 2], max_tokens=18, counts=[5, 4]) == [[0, 1]]
    assert split_by_length([], max_tokens=1, counts=[]) == []


def test_a_split_by_hand() -> None:
    assert split_by_length([3, 1, 5, 2, 3], max_tokens=6) == [[2], [0, 4], [3, 1]]
    assert split_by_length([3, 1, 5, 2, 3], max_tokens=6, packed=True) == [[2], [0, 4], [3, 1]]
    assert split_by_length([4, 1, 1, 1], max_tokens=6) == [[0], [1, 2, 3]]
    assert split_by_length([4, 1, 1, 1], max_tokens=6, packed=True) == [[0, 1, 2], [3]]
    assert split_by_length([9, 9], max_tokens=1) == [[0], [1]]
    assert split_by_length([], max_tokens=1) == []


def test_pad_by_hand() -> None:
    batch = pad([np.array([5, 6, 7], dtype=np.int32), np.array([8, 9], dtype=np.int32)], [2, 1], 4, (3, 1))
    assert batch.ids_BT.tolist() == [[5, 6, 7], [8, 9, 4]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.attention_BT is not None
    assert batch.attention_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.target_BT.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert batch.indices == (3, 1)


def test_pack_by_hand() -> None:
    batch = pack([np.array([5, 6, 7], dtype=np.int32), np.array([8, 9], dtype=np.int32)], [2, 1], 4, (3, 1))
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_BT is None
    assert batch.target_BT.tolist() == [[0, 0, 1, 0, 1]]
    assert batch.indices == (3, 1)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_on", LOSS_ON)
@settings(max_examples=40, deadline=None)
@given(made=sequences(), max_tokens=st.integers(1, 40), data=st.data())
def test_micro_batches_hold_every_sequence_and_target_once(
    packed: bool, loss_on: LossOn, made: list[tuple[list[int], int, int]], max_tokens: int, data: st.DataObject
) -> None:
    table = table_of(made)
    indices = data.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=15))  # a row may be drawn twice
    batches = list(micro_batches(table, np.array(indices), loss_on, max_tokens, packed, PAD))
    expected = targets(made, loss_on)
    held = [(index, *found) for batch in batches for index, found in zip(batch.indices, laid_out(batch), strict=True)]
    assert sorted(held) == sorted((index, made[index][0], expected[index]) for index in indices)
    for batch in batches:
        assert not batch.target_BT[batch.position_ids_BT == 0].any(), "nothing predicts the first token of a sequence"
        assert batch.ids_BT.numel() <= max_tokens or len(batch.indices) == 1
        assert (batch.attention_BT is None) == packed
        assert {tensor.dtype for tensor in (batch.ids_BT, batch.position_ids_BT, batch.target_BT)} == {torch.int64}
    total = sum(int(batch.target_BT.sum()) for batch in batches)
    assert total == target_count(table, indices, loss_on) == sum(len(expected[index]) for index in indices)


@settings(max_examples=30, deadline=None)
@given(sequences(), st.integers(1, 3))
def test_ranks_share_a_step_s_targets(made: list[tuple[list[int], int, int]], ranks: int) -> None:
    table = table_of(made)
    indices = RowOrder(len(made), 0).take(0, len(made))
    for loss_on in LOSS_ON:
        shares = [target_count(table, indices[rank::ranks], loss_on) for rank in range(ranks)]
        assert sum(shares) == target_count(table, indices, loss_on)


def test_first_targets() -> None:
    table = table_of([([1, 2, 3, 4], 2, 0), ([1, 2, 3], 0, 1), ([1, 2, 3], 1, 2), ([1, 2], 2, 3), ([1], 0, 4), ([], 0, 5)])
    assert [first_target(table, index, "completion") for index in range(5)] == [2, 1, 1, 2, 1]
    assert [first_target(table, index, "all") for index in range(5)] == [1, 1, 1, 1, 1]
    assert [target_count(table, [index], "completion") for index in range(6)] == [2, 2, 2, 0, 0, 0]
    assert [target_count(table, [index], "all") for index in range(6)] == [3, 2, 2, 1, 0, 0]
    assert target_count(table, [], "all") == 0


def test_a_batch_moves_whole() -> None:
    rows = [np.array([5, 6, 7]), np.array([8, 9])]
    for batch in (pad(rows, [2, 1], PAD, (0, 1)), pack(rows, [2, 1], PAD, (0, 1))):
        moved = batch.to(torch.device("meta"))
        assert {tensor.device.type for tensor in (moved.ids_BT, moved.position_ids_BT, moved.target_BT)} == {"meta"}
        assert (moved.attention_BT is None) == (batch.attention_BT is None)
        assert moved.attention_BT is None or moved.attention_BT.device.type == "meta"
        assert moved.indices == (0, 1)
