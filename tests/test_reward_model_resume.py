"""The reward model dies after any step, and ends in the bytes of a run that did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reward_bench
from reward_bench import Make, pair_loss, series, tables
from test_sft import CrashError, Rows, assert_killed_child_resumes, digests, events

from stages.models.reward import new_reward_model, save_reward_model
from stages.request import run_stage
from stages.run import Event

request_of = reward_bench.request_of
pairs = reward_bench.pairs


@pytest.fixture
def data(pairs: Rows) -> dict[str, Rows]:
    given = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return {"train": pairs[:32], "heldout": pairs[32:], "demonstrations": given, "samples": given[::2]}


@pytest.fixture
def forgetful(init_folder: Path, tmp_path: Path) -> Path:
    """A reward model with dropout: training draws random numbers, and what was loaded is in evaluation mode."""
    spec = (init_folder / "init.yaml").read_text()
    (tmp_path / "init.yaml").write_text(spec.replace("model:", "model:\n  attention_dropout: 0.5", 1))
    save_reward_model(new_reward_model(tmp_path, seed=0), tmp_path / "forgetful")
    return tmp_path / "forgetful"


def test_the_same_config_gives_the_same_bytes(request_of: Make, data: dict[str, Rows], forgetful: Path) -> None:
    one, other, changed = (digests(run_stage(request_of({"seed": seed}, model=forgetful, **data))) for seed in (0, 0, 1))
    assert one == other
    assert {"checkpoint/model.safetensors", "checkpoint/config.json", "scores/data.parquet"} <= set(one)
    for name in ("checkpoint/model.safetensors", "scores/data.parquet"):
        assert changed[name] != one[name]


def test_measuring_is_without_dropout(request_of: Make, data: dict[str, Rows], forgetful: Path) -> None:
    run = run_stage(request_of({"steps": 1, "batch_size": 32}, model=forgetful, **data))
    reward = new_reward_model(forgetful, seed=0)
    reward.model.eval()
    assert series(run, "heldout_loss_before") == [pytest.approx(pair_loss(reward.model, reward, data["heldout"]), abs=1e-5)]
    assert abs(series(run, "loss")[0] - pair_loss(reward.model, reward, data["train"])) > 1e-4


def test_a_run_that_fails_after_every_step_ends_as_one_that_does_not(
    request_of: Make, data: dict[str, Rows], forgetful: Path
) -> None:
    changes = {"steps": 6, "runtime": {"save_every": 1}}
    expected = run_stage(request_of(changes, model=forgetful, **data))
    request = request_of(changes, model=forgetful, **data)

    def crash(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    for _ in range(6):
        with pytest.raises(CrashError):
            run_stage(request, crash)
    resumed = run_stage(request, crash)
    assert [event["step"] for event in events(resumed.folder, "state")] == [1, 2, 3, 4, 5, 6]
    assert [event["name"] for event in events(resumed.folder, "table")] == list(tables(expected))[:-1]
    assert digests(resumed) == digests(expected)
    names = ("loss", "grad_norm", "lr", "heldout_loss_before", "heldout_loss", "reward_bias", "reward_scale")
    assert series(resumed, *names) == series(expected, *names)


def test_a_killed_child_resumes_to_the_same_bytes(request_of: Make, data: dict[str, Rows]) -> None:
    changes = {"steps": 40, "runtime": {"save_every": 1}}
    expected, request = run_stage(request_of(changes, **data)), request_of(changes, **data)
    assert_killed_child_resumes(request, expected)
    made = {"checkpoint": "model", "scores": "dataset"}
    assert json.loads((request.folder / "outputs.json").read_text()) == {"key": request.key, "outputs": made}
