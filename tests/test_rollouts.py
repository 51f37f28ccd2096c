"""Completions in hand: laid out in any batch and taken back, and kept in a state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.batching import pad
from stages.rollouts.batch import Rollouts
from stages.rollouts.engine import Completion
from stages.rollouts.sample import Sample

Lengths = list[tuple[int, int]]
PAD = 0
LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=8)


def rollouts_of(lengths: Lengths) -> Rollouts:
    """Completions of these (prompt, completion) lengths. All tokens differ; those of completions are kept under `ids`."""
    samples, token = [], 1
    for place, (prompt, completion) in enumerate(lengths):
        ids = list(range(token, token + prompt + completion))
        made = Completion(ids[prompt:], [-float(one) for one in ids[prompt:]], "stop" if place % 2 else "length")
        samples.append(Sample({"id": f"row {place}"}, 0, ids[:prompt], made, f"text {place}"))
        token += prompt + completion
    rollouts = Rollouts(samples)
    rollouts.tokens["ids"] = torch.tensor([float(one) for sample in samples for one in sample.completion.ids])
    return rollouts


def tokens_of(rollouts: Rollouts, indices: Sequence[int]) -> list[int]:
    return [token for index in indices for token in rollouts.samples[index].completion.ids]


# The batch.


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), budget=st.integers(1, 40), packed=st.booleans())
def test_any_batches_read_and_give_back_the_same_numbers(lengths: Lengths, seed: int, budget: int, packed: bool) -> None:
    rollouts = rollouts_of(lengths)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
    batches = rollouts.batches(chosen if seed % 2 else chosen.tolist(), budget, packed, PAD)
    assert sorted(index for batch in batches for index in batch.indices) == sorted(chosen.tolist())
    taken_N = torch.full_like(rollouts.tokens["ids"], -1.0)
    for batch in [batches[place] for place in rng.permutation(len(batches))]:
        assert len(batch.indices) == 1 or batch.ids_BT.numel() <= budget
        assert (batch.attention_BT is None) == packed
        whole = [token for index in batch.indices for token in rollouts.ids(index).tolist()]
        assert batch.ids_BT[batch.ids_BT != PAD].tolist() == whole
        # The targets are the completions' tokens, and a token's number is found where the token is.
        found_BT = rollouts.lay_out("ids", batch)
        assert found_BT.dtype == torch.float32
        assert batch.ids_BT[batch.target_BT == 1].tolist() == tokens_of(rollouts, batch.indices)
        assert torch.equal(found_BT, torch.where(batch.target_BT == 1, batch.ids_BT, 0).float())
        rollouts.take(taken_N, batch, found_BT.masked_fill(batch.target_BT == 0, math.nan).double())
    known = torch.isin(rollouts.tokens["ids"], torch.tensor([float(token) for token in tokens_of(rollouts, chosen.tolist())]))
    assert torch.equal(taken_N, torch.where(known, rollouts.tokens["ids"], -1.0))


def test_packed_batches_hold_more() -> None:
    rollouts = rollouts_of([(1, 9), (1, 4), (1, 1), (2, 1)])
    assert [batch.indices for batch in rollouts.batches(range(4), 20, True, PAD)] == [(0, 1, 3, 2)]
    assert [batch.indices for batch in rollouts.batches(range(4), 20, False, PAD)] == [(0, 1), (3, 2)]


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_places_are_the_tokens_of_completions_in_the_order_asked_for(lengths: Lengths, seed: int) -> None:
    rollouts = rollouts_of(lengths)
    chosen = np.random.default_rng(seed).permutation(len(lengths)).tolist()[: seed % (len(lengths) + 1)]
    assert rollouts.tokens["ids"][rollouts.places(chosen)].tolist() == tokens_of(rollouts, chosen)
    assert rollouts.places(chosen).dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS)
def test_right_padded_numbers_are_kept_as_they_were(lengths: Lengths) -> None:
    rollouts = rollouts_of(lengths)
    width = max(length for _, length in lengths)
    assert rollouts.mask_BT.tolist() == [[1] * length + [0] * (width - length) for _, length in lengths]
    padded_BT = rollouts.padded("ids")
    assert padded_BT.tolist() == [one.completion.ids + [0] * (width - len(one.completion.ids)) for one in rollouts.samples]
    rollouts.keep("again", padded_BT.masked_fill(rollouts.mask_BT == 0, math.nan).double())
    assert rollouts.tokens["again"].dtype == torch.float32
    assert torch.equal(rollouts.tokens["again"], rollouts.tokens["ids"])


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS)
def test_sums_are_over_each_completion(lengths: Lengths) -> None:
    rollouts = rollouts_of(lengths)
    sums_B = rollouts.sums_B(rollouts.tokens["ids"])
    assert sums_B.dtype == np.float64
    assert sums_B.tolist() == [sum(sample.completion.ids) for sample in rollouts.samples]
    assert rollouts.sums_B(-rollouts.tokens["ids"]).tolist() == (-sums_B).tolist()


def test_sums_are_added_in_double_precision() -> None:
    rollouts = rollouts_of([(1, 3), (2, 2)])
    assert rollouts.sums_B(torch.tensor([2.0**24, 1.0, 1.0, 3.0, math.nan])).tolist()[0] == 2**24 + 2


def test_what_is_known_of_completions() -> None:
    rollouts = rollouts_of([(2, 3), (1, 1), (3, 2)])
    assert len(rollouts) == 3
    assert rollouts.ids(1).tolist() == [6, 7]
    assert rollouts.ids(1).dtype == np.int64
    assert rollouts.lengths_B.tolist() == [3, 1, 2]
    assert rollouts.truncated_B.tolist() == [True, False, True]


def test_no_completions_make_no_batch_and_nothing_is_laid_out_where_no_token_counts() -> None:
    rollouts = rollouts_of([(2, 3), (1, 4)])
    assert rollouts.batches([], 10, False, PAD) == []
    batch = pad([rollouts.ids(0)], [5], PAD, ())
    assert torch.equal(rollouts.lay_out("ids", batch), torch.zeros(1, 5))
    before_N = rollouts.tokens["ids"].clone()
    rollouts.take(rollouts.tokens["ids"], batch, torch.full((1, 5), math.nan))
    assert torch.equal(rollouts.tokens["ids"], before_N)


numbers = st.floats(width=32)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lengths=LENGTHS)
def test_a_state_keeps_every_number_and_reads_rows_by_their_id(data: st.DataObject, lengths: Lengths) -> None:
    rollouts = rollouts_of(lengths)
    rows: dict[str, Any] = {f"row {place}": {"id": f"row {place}", "prompt": "a secret"} for place in range(9)}
    drawn: list[Sample] = []
    for sample in rollouts.samples:
        # Numbers of any kind, texts of any character, and rows that come twice.
        logps = data.draw(st.lists(st.floats(), min_size=len(sample.completion.ids), max_size=len(sample.completion.ids)))
        completion = Completion(sample.completion.ids, logps, sample.completion.finish)
        row = rows[f"row {data.draw(st.integers(0, 8))}"]
        drawn.append(Sample(row, data.draw(st.integers(0, 9)), sample.prompt_ids, completion, data.draw(st.text(max_size=5))))
    kept = Rollouts(drawn)
    count, size = int(kept.lengths_B.sum()), len(lengths)
    kept.tokens["logp"] = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    kept.tokens["more"] = rollouts.tokens["ids"]
    each = data.draw(st.lists(st.floats(), min_size=size, max_size=size))
    kept.each["reward"] = torch.tensor(each, dtype=torch.float64)
    with TemporaryDirectory() as name:
        kept.save(Path(name))
        assert not any(b"a secret" in file.read_bytes() for file in Path(name).iterdir())
        found = Rollouts.load(Path(name), rows)
    assert found is not None
    for ours, theirs in zip(kept.samples, found.samples, strict=True):
        assert theirs.row is ours.row
        assert (theirs.sample, theirs.prompt_ids, theirs.text) == (ours.sample, ours.prompt_ids, ours.text)
        assert (theirs.completion.ids, theirs.completion.finish) == (ours.completion.ids, ours.completion.finish)
        np.testing.assert_array_equal(theirs.completion.logps, ours.completion.logps)
    for ours, theirs in ((kept.tokens, found.tokens), (kept.each, found.each)):
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].numpy().tobytes() == theirs[name].numpy().tobytes()
    assert found.starts_B.tolist() == kept.starts_B.tolist()


def test_a_state_without_completions_gives_none(tmp_path: Path) -> None:
    assert Rollouts.load(tmp_path, {}) is None
