"""What every loop starts with: learning rates, weight decay, threads, precision, the device."""

from __future__ import annotations

import math
from typing import Any

import looping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Loop
from pydantic import ValidationError
from test_logprobs import VOCABULARY, tiny_model

from stages.data.tokens import TokenTable
from stages.errors import InputError
from stages.specs.base import Runtime
from stages.specs.common import Optimizer
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, rate, set_threads

table = looping.table


def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
    config = Optimizer(schedule=schedule, warmup=warmup)
    return [rate(config, step, steps) for step in range(steps + 1)]


def test_the_warm_up_rises_to_the_peak_and_the_schedule_falls_to_nothing() -> None:
    assert rates("linear", 0.2, 10) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert rates("linear", 0.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates("constant", 0.5, 4) == [0.5, 1, 1, 1, 1]
    half = math.sqrt(0.5)
    assert rates("cosine", 0.0, 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    assert rates("cosine", 0.2, 10)[:4] == pytest.approx([0.5, 1, 1, (1 + math.cos(math.pi / 8)) / 2])
    assert rates("linear", 0.03, 1)[0] == 1


@given(
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.floats(0, 0.99),
    steps=st.integers(1, 200),
)
def test_no_step_is_without_a_learning_rate(schedule: str, warmup: float, steps: int) -> None:
    values = rates(schedule, warmup, steps)[:-1]
    peak = values.index(max(values))
    assert values[peak] == 1
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_the_optimizer_follows_the_schedule(table: TokenTable) -> None:
    loop = Loop(tiny_model("llama"), Optimizer(lr=0.5, schedule="linear", warmup=0.5), steps=4)
    seen = []
    for _ in range(4):
        seen.append(loop.optimizer.param_groups[0]["lr"])
        loop.step(table, [0])
    assert seen == pytest.approx([0.25, 0.5, 0.5, 0.25])


def test_weight_decay_falls_on_matrices_alone() -> None:
    model = tiny_model("gpt2")
    frozen: Any = model.get_input_embeddings()
    frozen.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = Optimizer(lr=0.5, weight_decay=0.25, warmup=0, schedule="constant")
    optimizer, _ = make_optimizer([(config, model.parameters())], 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = parameter.ndim >= 2 and parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.25 if shrunk else 1.0))
    assert {parameter.ndim for parameter in model.parameters()} == {1, 2}


def test_tied_weights_are_counted_once() -> None:
    tied, apart = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    assert count_parameters(apart) - count_parameters(tied) == VOCABULARY * 16


def test_threads_are_the_asked_number_or_one_for_a_small_model() -> None:
    try:
        assert set_threads(Runtime(threads=2), 10) == torch.get_num_threads() == 2
        assert set_threads(Runtime(), 999_999) == torch.get_num_threads() == 1
        assert set_threads(Runtime(), 1_000_000) == torch.get_num_threads() >= 1
    finally:
        torch.set_num_threads(1)


def test_stages_of_one_process_may_differ_in_precision() -> None:
    assert accelerator_for(Runtime(device="cpu"), "bfloat16").mixed_precision == "bf16"
    assert accelerator_for(Runtime(device="cpu"), "float32").mixed_precision == "no"


@pytest.mark.parametrize(("device", "there"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, there: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(InputError, match=f"runtime.device is {device}, and this machine has {there} GPUs"):
        accelerator_for(Runtime(device=device))
    with pytest.raises(ValidationError, match="device"):
        Runtime(device="gpu")
