"""Distillation dies at any state, and ends in the bytes of a run that did not; how the machine is used changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distilling
import pytest
import torch
from conftest import request_for
from distilling import CASES, DRAWN, Inputs, distill, with_dropout
from test_sft import LONG, CrashError, assert_killed_child_resumes, config, digests, events, metrics

from stages.run import Event

inputs = distilling.inputs
CHOSEN: dict[str, Any] = {"objective": "forward_kl", **DRAWN, "steps": 4, "batch_size": 7, "runtime": {"save_every": 1}}
NAMES = {"checkpoint/model.safetensors", "generations/data.parquet"}


@pytest.fixture(scope="module")
def given(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """With dropout, whose random numbers are to be gone on with too."""
    return inputs | {"model": with_dropout(inputs["model"], tmp_path_factory.mktemp("dropout") / "student")}


def test_the_same_config_gives_the_same_bytes(given: Inputs, tmp_path: Path) -> None:
    merged: list[dict[str, Any]] = [CHOSEN, CHOSEN | {"runtime": {"save_every": 3}}, CHOSEN | {"seed": 1}]
    one, other, changed = (digests(distill(given, tmp_path / str(number), **some)) for number, some in enumerate(merged))
    assert one == other
    assert set(one) >= NAMES
    assert all(changed[name] != one[name] for name in NAMES)


@pytest.mark.parametrize("changes", [{}, CASES["reverse_kl"] | {"source": "demonstrations"}], ids=["drawn", "demonstrations"])
def test_a_run_that_fails_at_every_state_ends_as_one_that_does_not(
    given: Inputs, tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected = distill(given, tmp_path / "whole", **CHOSEN | changes)

    def crash(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    crashes, run = 0, None
    while run is None and crashes < 10:
        try:
            run = distill(given, tmp_path / "broken", crash, **CHOSEN | changes)
        except CrashError:
            crashes += 1
            torch.manual_seed(1234)
    assert run is not None
    assert crashes == 4
    assert [event["step"] for event in events(run.folder, "state")] == [1, 2, 3, 4]
    assert digests(run) == digests(expected)
    for name in ("loss", "grad_norm", "heldout_loss_before", "heldout_loss"):
        assert metrics(run.folder, name) == metrics(expected.folder, name)


def test_a_killed_child_resumes_to_the_same_bytes(given: Inputs, tmp_path: Path) -> None:
    changes = CHOSEN | {**LONG, "batch_size": 4}
    expected = distill(given, tmp_path / "whole", **changes)
    assert_killed_child_resumes(request_for("distill", tmp_path / "killed", config(**changes), **given), expected)


@pytest.mark.parametrize("case", ["reverse_kl", "forward_kl drawn"])
def test_how_the_machine_is_used_does_not_change_the_losses(inputs: Inputs, tmp_path: Path, case: str) -> None:
    uses = [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 70, "packed": True}, {"generation_batch": 3, "save_every": 1}]
    found = []
    for number, use in enumerate(uses):
        run = distill(inputs, tmp_path / f"run {number}", **CASES[case], steps=4, runtime=use)
        found.append([*metrics(run.folder, "loss").values(), *metrics(run.folder, "heldout_loss").values()])
    assert len(found[0]) == 4 + 2
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-5)


def test_bfloat16_multiplies_and_no_more(inputs: Inputs, tmp_path: Path) -> None:
    exact, rough = (
        distill(inputs, tmp_path / dtype, **CASES["forward_kl"], steps=1, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    losses = [metrics(run.folder, "loss")[1] for run in (exact, rough)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
