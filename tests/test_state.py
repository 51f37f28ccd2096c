"""Resume states: a loop that is restored goes on bit for bit, and what a save leaves behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import looping
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from looping import Loop
from test_logprobs import tiny_model
from transformers import PreTrainedModel

from stages.data.tokens import TokenTable
from stages.run import Run
from stages.training import state

table = looping.table


def dropout_model() -> PreTrainedModel:
    return tiny_model("gpt2", embd_pdrop=0.5)


def test_a_restored_loop_goes_on_bit_for_bit(table: TokenTable, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    loop = Loop(dropout_model())
    assert state.load(run, loop.accelerator) is None
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    loop.step(table, [0, 1])
    state.save(run, loop.accelerator, 1, {"beta": 0.25})
    loop.step(table, [2, 3])
    loop.step(table, [4, 5])
    drawn = (random.random(), np.random.random(), torch.rand(3).tolist())

    random.seed(6)
    np.random.seed(7)
    torch.manual_seed(8)
    other = Loop(tiny_model("gpt2", embd_pdrop=0.5, initializer_range=0.1))
    torch.set_num_threads(2)
    resumed = state.load(run, other.accelerator)
    assert resumed == {"step": 1, "threads": 1, "beta": 0.25, "folder": run.load_state()}
    assert torch.get_num_threads() == 1
    other.step(table, [2, 3])
    other.step(table, [4, 5])
    assert torch.equal(other.weights(), loop.weights())
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == drawn
    assert other.scheduler.last_epoch == loop.scheduler.last_epoch == 3
    moments = [value["exp_avg_sq"] for value in loop.optimizer.state.values()]
    for one, value in zip(moments, other.optimizer.state.values(), strict=True):
        assert torch.equal(one, value["exp_avg_sq"])


def test_dropout_makes_that_test_depend_on_the_generator(table: TokenTable) -> None:
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(Loop(dropout_model()).step(table, [0, 1])["loss"])
    assert losses[0] != losses[1]


def test_only_the_newest_state_is_kept(table: TokenTable, tmp_path: Path) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    for step in (1, 2, 10):
        state.save(run, loop.accelerator, step, {})
    assert [path.name for path in (run.folder / "state").iterdir()] == ["step-00000010"]
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["step"] == 10


def test_a_save_that_is_cut_short_leaves_the_last_state(
    table: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    state.save(run, loop.accelerator, 1, {})
    weights = loop.weights()
    loop.step(table, [0])

    def cut_short(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state.json, "dumps", cut_short)
        with pytest.raises(KeyboardInterrupt):
            state.save(run, loop.accelerator, 2, {})
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["step"] == 1
    assert torch.equal(loop.weights(), weights)
    state.save(run, loop.accelerator, 2, {})
    assert [path.name for path in (run.folder / "state").iterdir()] == ["step-00000002"]


def test_a_loops_own_files_are_part_of_its_state(table: TokenTable, tmp_path: Path) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    seen: list[Path] = []

    def write(folder: Path) -> None:
        assert (folder / "loop.json").is_file(), "it may read what is there"
        seen.append(folder)
        (folder / "mine").mkdir()
        (folder / "mine" / "rows.txt").write_text(f"state {len(seen)}")

    state.save(run, loop.accelerator, 1, {"a": 1}, write)
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["folder"] == run.load_state()
    assert (resumed["folder"] / "mine" / "rows.txt").read_text() == "state 1"
    assert not seen[0].exists(), "the draft has become the state"

    def die(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.save(run, loop.accelerator, 2, {}, die)
    assert state.load(run, loop.accelerator) == resumed
    assert (resumed["folder"] / "mine" / "rows.txt").read_text() == "state 1"
    state.save(run, loop.accelerator, 2, {})
    last = state.load(run, loop.accelerator)
    assert last is not None
    assert not (last["folder"] / "mine").exists()


def test_only_the_main_process_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    seen: list[Path] = []
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    state.save(run, loop.accelerator, 1, {}, seen.append)
    assert seen == []
