"""Numbers of a loop's losses: means weighted by their shares, largest values, over micro-batches, updates and processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collect import on_ranks

from stages.specs.base import Runtime
from stages.training.meter import Meter
from stages.training.setup import accelerator_for


@pytest.fixture(scope="module")
def accelerator() -> Any:
    return accelerator_for(Runtime(device="cpu", threads=1))


@settings(max_examples=30, deadline=None)
@given(
    updates=st.lists(
        st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    processes=st.integers(1, 3),
)
def test_means_are_over_an_updates_tokens_and_then_over_updates(updates: list[list[list[float]]], processes: int) -> None:
    """Each update's tokens lie in micro-batches of any size, which lie on any process."""

    def one(rank: Any) -> dict[str, float]:
        meter = Meter()
        for update in updates:
            total = sum(map(len, update))
            # A process without a micro-batch has one in which no token counts.
            for values in update[rank.process_index :: processes] or [[]]:
                values_N = torch.tensor(values, dtype=torch.float32)
                meter.add({"mean": values_N.sum() / total, "share": torch.tensor(len(values) / total)})
                meter.top("top", values_N.max() if values else torch.tensor(-10.0))
        return meter.read(rank, len(updates))

    tokens = [[value for values in update for value in values] for update in updates]
    for found in on_ranks(processes, one):
        assert found == {
            "mean": pytest.approx(float(np.mean([np.mean(one) for one in tokens])), abs=1e-5),
            "share": pytest.approx(1.0, abs=1e-6),
            "top": max(value for one in tokens for value in one),
        }


def test_processes_may_meet_names_in_another_order() -> None:
    def one(rank: Any) -> dict[str, float]:
        meter, names = Meter(), ["a", "b", "c"]
        for name in names[:: 1 if rank.process_index else -1]:
            meter.add({name: torch.tensor(float(ord(name)))})
            meter.top(f"{name} top", torch.tensor(-float(ord(name)) - rank.process_index))
        return meter.read(rank, 2)

    for found in on_ranks(2, one):
        assert found == {"a": 97.0, "b": 98.0, "c": 99.0, "a top": -97.0, "b top": -98.0, "c top": -99.0}


def test_one_process_reads_plain_numbers_without_largest_values(accelerator: Any) -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.5)})
    meter.add({"loss": torch.tensor(0.5), "other": torch.tensor(3, dtype=torch.int64)})
    found = meter.read(accelerator, 4)
    assert found == {"loss": 0.5, "other": 0.75}
    assert {type(value) for value in found.values()} == {float}
    assert meter.read(accelerator, 1) == {"loss": 2.0, "other": 3.0}, "reading takes nothing away"


def test_the_largest_value_is_kept_be_it_early_or_late(accelerator: Any) -> None:
    for values in ([-3.0, -1.0, -2.0], [-1.0, -3.0, -2.0], [-3.0, -2.0, -1.0]):
        meter = Meter()
        meter.add({"loss": torch.tensor(0.0)})
        for value in values:
            meter.top("ratio", torch.tensor(value))
        assert meter.read(accelerator, 3) == {"loss": 0.0, "ratio": -1.0}


def test_what_is_not_a_number_shows(accelerator: Any) -> None:
    meter = Meter()
    for value in (1.0, math.nan, 2.0):
        meter.add({"loss": torch.tensor(value)})
        meter.top("ratio", torch.tensor(value))
    assert all(math.isnan(value) for value in meter.read(accelerator, 3).values())


def test_sums_are_double_and_hold_no_graph(accelerator: Any) -> None:
    meter, value = Meter(), torch.tensor(2.0**24, requires_grad=True)
    meter.add({"loss": value * 1})
    meter.top("ratio", value * 2)
    for _ in range(3):
        meter.add({"loss": torch.ones(())})
    assert not meter.sums["loss"].requires_grad
    assert not meter.largest["ratio"].requires_grad
    assert meter.read(accelerator, 1) == {"loss": 2**24 + 3, "ratio": 2**25}
