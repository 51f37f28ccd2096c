"""What the loop of every supervised stage tells and saves, and when."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import request_for
from test_sft import CrashError, Make, Rows, config, encoded, events, metrics

import stages.training.supervised
from stages.data.batching import RowOrder
from stages.models.load import load_policy
from stages.request import run_stage
from stages.run import Event


def test_what_is_logged_and_saved_when(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every so many steps, and after the last; the rate is that of the step, the tokens are all since the start."""
    seconds = count(start=100)
    monkeypatch.setattr(stages.training.supervised, "perf_counter", lambda: next(seconds))
    chosen: dict[str, Any] = config(steps=5, batch_size=4, optimizer={"lr": 0.5}, runtime={"log_every": 2, "save_every": 3})
    inputs = {"model": init_folder, "train": dataset(chain_rows[:12], "train"), "heldout": dataset(chain_rows[40:], "heldout")}
    run = run_stage(request_for("sft", tmp_path / "run", chosen, **inputs))
    assert [event["step"] for event in events(run.folder, "state")] == [3, 5]
    assert list(metrics(run.folder, "loss")) == list(metrics(run.folder, "grad_norm")) == [2, 4, 5]
    # Linear to 0 over five steps, as the step itself had it.
    assert metrics(run.folder, "lr") == pytest.approx({2: 0.4, 4: 0.2, 5: 0.1})
    told = [(event["done"], event["total"]) for event in events(run.folder, "progress")]
    assert told == [(2, 5), (4, 5), (5, 5)]
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in encoded(load_policy(init_folder), chain_rows[:12])]
    tokens = [sum(lengths[place] for place in RowOrder(12, 0).take(0, 4 * steps)) for steps in (2, 4, 5)]
    expected = {step: tokens[n] / (n + 1) for n, step in enumerate((2, 4, 5))}
    assert metrics(run.folder, "tokens_per_second") == pytest.approx(expected)
    # An epoch is three steps.
    assert list(metrics(run.folder, "heldout_loss_before")) == [0]
    assert list(metrics(run.folder, "heldout_loss")) == [3, 5]


def test_the_held_out_loss_before_is_measured_once(init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path) -> None:
    inputs = {"model": init_folder, "train": dataset(chain_rows[:12], "train"), "heldout": dataset(chain_rows[40:], "heldout")}

    def crash(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    request = request_for("sft", tmp_path / "run", config(steps=2, runtime={"save_every": 1}), **inputs)
    with pytest.raises(CrashError):
        run_stage(request, crash)
    run_stage(request)
    before = [one for one in events(request.folder, "metrics") if "heldout_loss_before" in one["metrics"]]
    assert len(before) == 1
