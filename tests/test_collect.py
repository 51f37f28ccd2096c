"""Sampling and measuring completions: what one process finds, several find together."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_rollouts import tokens_of

from stages.data.batching import TokenBatch
from stages.data.chat import encode_prompt
from stages.errors import InputError
from stages.models.load import LoadedPolicy, load_policy
from stages.models.logprobs import TokenLogProbs
from stages.models.reward import RewardModel, new_reward_model
from stages.rollouts import collect as collecting
from stages.rollouts.batch import Rollouts
from stages.rollouts.collect import collect, measure, score, usable_prompts
from stages.rollouts.sample import Sample, sample_rows
from stages.run import Run
from stages.specs.base import Runtime
from stages.specs.common import Sampling
from stages.training.setup import accelerator_for

Rows = list[dict[str, Any]]
PAD = 0
CPU = Runtime(device="cpu", threads=1)
SAMPLING = Sampling(max_new_tokens=6)


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


def on_ranks(count: int, function: Callable[[Any], Any], module: Any = collecting) -> list[Any]:
    """What each of `count` processes gets from a function of its Accelerator; `module` is where it gathers objects."""
    slots, barrier, here = [None] * count, threading.Barrier(count), threading.local()

    def run(index: int) -> Any:
        here.rank = Rank(index, slots, barrier)
        try:
            return function(here.rank)
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(module, "gather_object", lambda objects: [one for part in here.rank.exchange(objects) for one in part])
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
    policy: LoadedPolicy, collected: Rollouts, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, shares = [sample.row for sample in collected.samples], []
    small = CPU.model_copy(update={"generation_batch": 2})

    def counted(*given: Any, **named: Any) -> Any:
        shares.append(len(given[1]))
        return sample_rows(*given, **named)

    monkeypatch.setattr(collecting, "sample_rows", counted)
    for found in on_ranks(processes, lambda accelerator: collect(accelerator, policy, rows, SAMPLING, 4, 2, small)):
        assert_same(found.samples, collected.samples)
    assert sorted(shares) == sorted(len(rows[rank::processes]) for rank in range(processes))


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_sample_is_told_of_once_with_its_place_by_the_process_that_draws_it(
    policy: LoadedPolicy, chain_rows: Rows, processes: int
) -> None:
    rows, told = [chain_rows[place] for place in (3, 1, 3, 0)], []

    def one(accelerator: Any) -> Rollouts:
        def ended(place: int, sample: Sample) -> None:
            told.append((place, accelerator.process_index, sample))

        return collect(accelerator, policy, rows, SAMPLING, 4, 2, CPU, samples=3, ended=ended)

    found = on_ranks(processes, one)[0]
    told.sort(key=lambda one: one[:2])
    assert [(place, rank) for place, rank, _ in told] == [(place, place // 3 % processes) for place in range(12)]
    assert_same([sample for _, _, sample in told], found.samples)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_groups_are_sampled_side_by_side_and_never_twice(policy: LoadedPolicy, chain_rows: Rows, processes: int) -> None:
    rows = [chain_rows[place] for place in (3, 1, 3, 0)]

    def two_rounds(accelerator: Any) -> Rollouts:
        seen = Counter[str]()
        first = collect(accelerator, policy, rows, SAMPLING, 4, 2, CPU, samples=3, seen=seen)
        return first.joined(collect(accelerator, policy, [chain_rows[1]], SAMPLING, 4, 2, CPU, samples=3, seen=seen))

    for found in on_ranks(processes, two_rounds):
        assert [chain_rows.index(sample.row) for sample in found.samples] == [3, 3, 3, 1, 1, 1, 3, 3, 3, 0, 0, 0, 1, 1, 1]
        assert [sample.sample for sample in found.samples] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
        assert found.groups_B.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 2, 2, 2, 1, 1, 1]
        alone, _ = sample_rows(policy, [chain_rows[3], chain_rows[1]], SAMPLING, seed=4, step=2, samples=6)
        assert_same([found.samples[i] for i in (0, 1, 2, 6, 7, 8, 3, 4, 5, 12, 13, 14)], alone)


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
