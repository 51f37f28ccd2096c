"""Completions in hand: laid out in any batch and taken back, kept in a state, sampled and measured by one process or many."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.batching import TokenBatch, pad
from stages.data.chat import encode_prompt
from stages.errors import InputError
from stages.models.load import LoadedPolicy, load_policy
from stages.models.logprobs import TokenLogProbs
from stages.models.reward import RewardModel, new_reward_model
from stages.rollouts import collect as collecting
from stages.rollouts.batch import Rollouts
from stages.rollouts.collect import collect, measure, score, usable_prompts
from stages.rollouts.engine import Completion
from stages.rollouts.report import rollout_metrics, rollout_records
from stages.rollouts.sample import Sample, sample_rows
from stages.run import Run
from stages.specs.base import Runtime
from stages.specs.common import Sampling
from stages.training.setup import accelerator_for

Rows = list[dict[str, Any]]
Lengths = list[tuple[int, int]]
PAD = 0
CPU = Runtime(device="cpu", threads=1)
SAMPLING = Sampling(max_new_tokens=6)
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


# Processes, as threads that wait for each other.


class Rank:
    """One of several processes: as much of an Accelerator as collecting and metering need."""

    device = torch.device("cpu")

    def __init__(self, index: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes = index, len(slots)
        self._slots, self._barrier = slots, barrier

    def exchange(self, value: Any) -> list[Any]:
        self._slots[self.process_index] = value
        self._barrier.wait(60)
        found = list(self._slots)
        self._barrier.wait(60)
        return found

    def autocast(self) -> Any:
        return nullcontext()

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return torch.stack(self.exchange(values)).sum(0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.exchange(values))


def on_ranks(count: int, function: Callable[[Any], Any]) -> list[Any]:
    """What each of `count` processes gets from a function of its Accelerator."""
    slots, barrier, here = [None] * count, threading.Barrier(count), threading.local()

    def run(index: int) -> Any:
        here.rank = Rank(index, slots, barrier)
        try:
            return function(here.rank)
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(
            collecting, "gather_object", lambda objects: [one for part in here.rank.exchange(objects) for one in part]
        )
        return list(pool.map(run, range(count)))


@pytest.fixture(scope="module")
def policy(init_folder: Path) -> LoadedPolicy:
    policy = load_policy(init_folder)
    policy.model.eval()
    return policy


@pytest.fixture(scope="module")
def reward(init_folder: Path) -> RewardModel:
    made = new_reward_model(init_folder, seed=1)
    made.calibrate(0.25, -2.0)
    return made


def assert_same(ours: Sequence[Sample], theirs: Sequence[Sample]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.row is other.row
        assert (one.sample, one.prompt_ids, one.completion.ids) == (other.sample, other.prompt_ids, other.completion.ids)
        assert one.completion.logps == pytest.approx(other.completion.logps, abs=1e-5)
        assert (one.text, one.completion.finish) == (other.text, other.completion.finish)


@pytest.fixture(scope="module")
def collected(policy: LoadedPolicy, chain_rows: Rows) -> Rollouts:
    rows = [chain_rows[place] for place in (3, 1, 3, 0, 2, 3, 1)]
    return collect(accelerator_for(CPU), policy, rows, SAMPLING, seed=4, step=2, runtime=CPU)


def test_rows_are_sampled_in_order_and_those_that_come_twice_anew(
    policy: LoadedPolicy, chain_rows: Rows, collected: Rollouts
) -> None:
    assert [chain_rows.index(sample.row) for sample in collected.samples] == [3, 1, 3, 0, 2, 3, 1]
    assert [sample.sample for sample in collected.samples] == [0, 0, 1, 0, 0, 2, 1]
    assert len({tuple(sample.completion.ids) for sample in collected.samples if sample.row is chain_rows[3]}) == 3
    for sample in collected.samples:
        # Nothing else has a say: seed, step, row and number make a sample.
        first, _ = sample_rows(policy, [sample.row], SAMPLING, seed=4, step=2, samples=3)
        assert_same([sample], [first[sample.sample]])
    other, _ = sample_rows(policy, [chain_rows[0]], SAMPLING, seed=4, step=3)
    assert other[0].completion.ids != collected.samples[3].completion.ids
    assert {"stop", "length"} >= {sample.completion.finish for sample in collected.samples}


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_processes_share_the_sampling_and_all_end_with_all_of_it(
    policy: LoadedPolicy, collected: Rollouts, processes: int
) -> None:
    rows, heard = [sample.row for sample in collected.samples], []
    small = CPU.model_copy(update={"generation_batch": 2})

    def one(accelerator: Any) -> Rollouts:
        rank = accelerator.process_index
        return collect(accelerator, policy, rows, SAMPLING, 4, 2, small, lambda done: heard.append((rank, done)))

    for found in on_ranks(processes, one):
        assert_same(found.samples, collected.samples)
    shares = [len(rows[rank::processes]) for rank in range(processes)]
    assert sorted(heard) == [(rank, min(done + 2, share)) for rank, share in enumerate(shares) for done in range(0, share, 2)]


def test_a_row_is_numbered_from_where_it_is_told(policy: LoadedPolicy, chain_rows: Rows) -> None:
    rows = [chain_rows[0], chain_rows[1] | {"prompt": "+" * 200}, chain_rows[2]]
    five, dropped = sample_rows(policy, rows, SAMPLING, seed=0, samples=5)
    assert (len(five), dropped) == (10, 1)
    found, dropped = sample_rows(policy, rows, SAMPLING, seed=0, samples=2, numbers=[3, 4, 1])
    assert dropped == 1
    assert_same(found, [five[3], five[4], five[6], five[7]])
    plain, _ = sample_rows(policy, rows, SAMPLING, seed=0, samples=2)
    assert_same(plain, [five[0], five[1], five[5], five[6]])
    assert sample_rows(policy, [], SAMPLING, seed=0, numbers=[]) == ([], 0)
    with pytest.raises(ValueError, match="zip"):
        sample_rows(policy, rows, SAMPLING, seed=0, numbers=[0])


@pytest.mark.parametrize("processes", [1, 2, 9])
@torch.no_grad()
def test_scores_are_those_of_exactly_what_was_sampled(reward: RewardModel, collected: Rollouts, processes: int) -> None:
    reward.model.eval()
    model: Any = reward.model
    raw = [float(model(torch.from_numpy(collected.ids(place))[None]).logits) for place in range(len(collected))]
    calls: list[int] = []
    hook = reward.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    for tokens, batches in ((1, len(collected)), (10_000, min(processes, len(collected)))):
        runtime = CPU.model_copy(update={"micro_batch_tokens": tokens})
        calls.clear()
        for found_B in on_ranks(processes, lambda rank, runtime=runtime: score(rank, reward, collected, runtime)):
            assert found_B.dtype == np.float64
            assert found_B.tolist() == pytest.approx([(one + 0.25) * -2.0 for one in raw], abs=1e-5)
        assert len(calls) == batches
    hook.remove()
    assert max(raw) - min(raw) > 0.01


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 9])
def test_each_process_measures_its_share(policy: LoadedPolicy, collected: Rollouts, processes: int, packed: bool) -> None:
    rollouts, module = Rollouts(collected.samples), TokenLogProbs(policy.model)

    def function(batch: TokenBatch) -> Sequence[torch.Tensor]:
        assert not torch.is_grad_enabled()
        outside_BT = torch.full(batch.ids_BT.shape, math.nan)
        return module(batch), torch.where(batch.target_BT == 1, batch.ids_BT.double(), outside_BT)

    def one(accelerator: Any) -> Rollouts:
        mine = range(accelerator.process_index, len(rollouts), processes)
        own = Rollouts(rollouts.samples)
        measure(accelerator, own, ("logp", "ids"), function, own.batches(mine, 60, packed, PAD))
        return own

    ids = tokens_of(rollouts, range(len(rollouts)))
    sampled = [logp for sample in rollouts.samples for logp in sample.completion.logps]
    for found in on_ranks(processes, one):
        assert list(found.tokens) == ["logp", "ids"]
        assert {values_N.dtype for values_N in found.tokens.values()} == {torch.float32}
        assert found.tokens["ids"].tolist() == ids
        assert found.tokens["logp"].tolist() == pytest.approx(sampled, abs=1e-5)


def test_measuring_and_scoring_multiply_in_the_stages_precision(reward: RewardModel, collected: Rollouts) -> None:
    found: list[bool] = []

    def function(batch: TokenBatch) -> Sequence[torch.Tensor]:
        found.append(torch.is_autocast_enabled("cpu"))
        return (torch.zeros(batch.ids_BT.shape),)

    scores, rollouts = [], Rollouts(collected.samples)
    for dtype in ("float32", "bfloat16"):
        accelerator = accelerator_for(CPU, dtype)
        measure(accelerator, rollouts, ("zero",), function, rollouts.batches([0], 100, False, PAD))
        scores.append(score(accelerator, reward, rollouts, CPU))
    assert found == [False, True]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.1


# Which prompts can be used.


def prompts_of(lengths: list[int], policy: LoadedPolicy) -> Rows:
    rows = [{"id": f"{place}", "prompt": "+" * length} for place, length in enumerate(lengths)]
    assert [len(encode_prompt(policy.tokenizer, row["prompt"])) for row in rows] == lengths
    return rows


@pytest.mark.parametrize(
    ("context", "others", "new_tokens", "kept"),
    [
        # What fills the policy's context leaves no room for a token.
        (10, [100, 100], 5, [1, 2, 5, 8, 9]),
        # A completion is cut off at the policy's context, which the others must hold as well.
        (10, [10, 12], 50, [1, 2, 5, 8, 9]),
        (10, [12, 9], 50, []),
        (10, [9], 2, [1, 2, 5]),
        (10, [9, 7], 2, [1, 2, 5]),
        (100, [10], 1, [1, 2, 5, 8, 9]),
        (100, [13, 20], 3, [1, 2, 5, 8, 9, 10]),
    ],
)
def test_prompts_are_used_when_their_longest_completion_fits_every_model(
    policy: LoadedPolicy, tmp_path: Path, dataset: Any, context: int, others: list[int], new_tokens: int, kept: list[int]
) -> None:
    rows = prompts_of([5, 1, 10, 8, 2, 11, 9], policy)
    actor: Any = SimpleNamespace(tokenizer=policy.tokenizer, context=context)
    models: list[Any] = [SimpleNamespace(context=other) for other in others]
    run, prompts = Run(tmp_path / "run", {}), dataset(rows)
    if not kept:
        with pytest.raises(InputError, match=r"all 7 prompts fill the context.*max_new_tokens"):
            usable_prompts(run, prompts, actor, models, new_tokens)
        return
    found = usable_prompts(run, prompts, actor, models, new_tokens)
    assert found == [row for row in rows if len(row["prompt"]) in kept]
    [event] = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [row["rows"] for row in event["rows"]] == [len(kept), 7 - len(kept)]


def test_an_empty_prompt_is_not_used(policy: LoadedPolicy, tmp_path: Path, dataset: Any) -> None:
    rows = prompts_of([0, 3], policy)
    assert usable_prompts(Run(tmp_path / "run", {}), dataset(rows), policy, [policy], 5) == rows[1:]


# What is said of them.


@pytest.fixture
def told() -> Rollouts:
    rollouts = rollouts_of([(2, 3), (1, 1)])
    rollouts.tokens["logp"] = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    rollouts.tokens["ref_logp"] = torch.tensor([-1.5, -1.0, -5.0, -0.25])
    rollouts.tokens["entropy"] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    rollouts.tokens["advantages"] = torch.tensor([3.0, -1.0, 1.0, 7.0])
    rollouts.each = {
        name: torch.tensor(values).double() for name, values in {"reward": [1.0, 4.0], "rewards.model": [2.0, 4.0]}.items()
    }
    return rollouts


def test_metrics_are_means_over_completions(told: Rollouts) -> None:
    assert rollout_metrics(told) == pytest.approx(
        {
            "reward": 2.5,
            "rewards.model": 3.0,
            "reward_std": math.sqrt(4.5),
            "kl": (1.5 - 0.25) / 2,
            "entropy": 3.0,
            "length": 2.0,
            "truncated": 0.5,
        }
    )


def test_a_record_has_the_columns_of_a_rollout(told: Rollouts) -> None:
    told.samples[1].row.update({"reward": 9.0, "step": 77, "note": "kept"})
    assert rollout_records(told, 5) == [
        {
            "id": "row 0",
            "step": 5,
            "sample": 0,
            "completion": "text 0",
            "length": 3,
            "finish": "length",
            "policy": "policy",
            "reward": 1.0,
            "rewards.model": 2.0,
            "kl": 1.5,
            "advantage": 1.0,
        },
        {
            "id": "row 1",
            "reward": 4.0,
            "note": "kept",
            "step": 5,
            "sample": 0,
            "completion": "text 1",
            "length": 1,
            "finish": "stop",
            "policy": "policy",
            "rewards.model": 4.0,
            "kl": -0.25,
            "advantage": 7.0,
        },
    ]
