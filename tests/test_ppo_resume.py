"""PPO dies in any phase of any step, and ends in the bytes of a run that did not."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import ppo_bench
import pytest
import torch
from conftest import request_for
from ppo_bench import (
    CONFIG,
    Bench,
    CrashError,
    Folders,
    digests,
    events,
    folder,
    killed,
    merged,
    same,
    series,
    train,
    until_done,
)

import stages.ppo
from stages.errors import InputError
from stages.request import run_stage
from stages.run import Event, Run

folders = ppo_bench.folders
bench = ppo_bench.bench

LONG: dict[str, Any] = {"steps": 3, "batch_size": 4, "trust_region": "adaptive_kl", "old_policy_kl": {"target": 1e-4}}
LONG["optimizer"] = {"schedule": "linear"}


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    return train(folders, tmp_path_factory.mktemp("whole"), **LONG)


def test_the_same_config_gives_the_same_bytes(bench: Bench, whole: Run) -> None:
    names = {"checkpoint/model.safetensors", "critic/model.safetensors", "rollouts/data.parquet"}
    assert names <= digests(whole).keys()
    assert same(bench.train("again", **LONG), whole)
    changed = digests(bench.train("other", seed=1, **LONG))
    assert all(changed[name] != digests(whole)[name] for name in names)
    assert series(whole, "old_policy_kl_coefficient") == [1.0, 2.0, 4.0]
    assert series(whole, "lr") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert [(event["done"], event["total"]) for event in events(whole, "progress")] == [(1, 3), (2, 3), (3, 3)]


# Each step fails once at a place. With save_every 1 there is a state after each sampling and after each step's updates; with 2
# for the second and the last step alone: until there is one, the stage starts anew. Then the steps that are sampled.
CRASHES = [
    ("collect", 1, [0, 1, 2]),
    ("_judge", 1, [0, 0, 1, 1, 2, 2]),
    ("optimization_step", 1, [0, 1, 2]),
    ("state", 1, [0, 1, 2]),
]
CRASHES += [("collect", 2, [0, 0, 1, 2]), ("_judge", 2, [0, 0, 1, 0, 1, 2, 2]), ("optimization_step", 2, [0, 0, 1, 2])]


@pytest.mark.parametrize(("place", "save_every", "sampled"), [*CRASHES, ("state", 2, [0, 1, 2])])
def test_a_run_that_fails_in_every_step_ends_as_one_that_does_not(
    bench: Bench, whole: Run, place: str, save_every: int, sampled: list[int]
) -> None:
    calls: Counter[Any] = Counter()
    at = {"collect": 5, "_judge": 2}.get(place, 7)

    def crash(*given: Any) -> None:
        step = given[7]().split(",")[0] if at == 7 else given[at]
        calls[step] += 1
        if calls[step] == (3 if at == 7 else 1):
            raise CrashError

    def heard(event: Event) -> None:
        if place == event["event"] == "state":
            raise CrashError

    if place != "state":
        bench.spy(place, before=crash)
    run, crashes = until_done(lambda: bench.train("run", heard, runtime={"save_every": save_every}, **LONG))
    saved = [event["step"] for event in events(run, "state")]
    assert saved == ([0, 1, 1, 2, 2, 3] if save_every == 1 else [1, 2, 2, 3])
    assert crashes == (len(saved) if place == "state" else 3)
    assert same(run, whole)
    assert bench.sampled == sampled


def test_demonstrations_and_a_shared_backbone_resume_to_the_same_bytes(bench: Bench) -> None:
    changes: dict[str, Any] = {"critic": {"shared": True}, "ptx": {"weight": 0.5, "batch_size": 4}, **LONG}
    changes["inputs"] = {"ptx": bench.folders["ptx"]}
    expected = bench.train("whole", **changes)

    def heard(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    run, crashes = until_done(lambda: bench.train("run", heard, **merged(changes, {"runtime": {"save_every": 1}})))
    assert crashes == 6
    assert same(run, expected)


def test_killed_children_resume_to_the_same_bytes(bench: Bench, whole: Run) -> None:
    config, left = merged(merged(CONFIG, LONG), {"runtime": {"save_every": 1}}), []
    inputs = {port: bench.folders[port] for port in ("policy", "reward", "prompts")}
    requests = [request_for("ppo", folder(bench.path / str(states)), config, **inputs) for states in (1, 2)]
    # One is killed between its updates, after the first state; one while it samples, after the second.
    killed(requests, (1, 2))
    for request in requests:
        # The completions that are in the state are not sampled again.
        state = max((request.folder / "state").glob("step-*"))
        left += range(int(state.name[5:13]) + (state / "rollouts.json").is_file(), 3)
        assert digests(run_stage(request)) == digests(whole)
    assert bench.sampled == left


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(bench: Bench, whole: Run) -> None:
    original = stages.ppo.value_loss
    often: dict[str, Any] = LONG | {"runtime": {"save_every": 1}}
    with bench.patch.context() as patch:
        patch.setattr(stages.ppo, "value_loss", lambda *given: original(*given) * (math.nan if len(bench.updates) == 7 else 1))
        with pytest.raises(InputError, match="loss is nan") as caught:
            bench.train(**often)
    # The third of four updates of the second step.
    last, moment = bench.updates[-1], bench.moments[-1]
    head, names = str(caught.value).split("]")[0].split("[")
    assert head == "step 2, prompts "
    rows = [moment.rollouts.samples[index].row for index in last.chosen]
    assert sorted(names.replace("'", "").split(", ")) == sorted(row["id"] for row in rows)
    for now, before in ((moment.loop.policy.model, last.policy), (moment.loop.critic.model, last.critic)):
        assert all(torch.equal(one, other) for one, other in zip(now.parameters(), before.parameters(), strict=True))
    [state] = (bench.path / "run" / "state").iterdir()
    assert state.name.startswith("step-00000001")
    assert not (bench.path / "run" / "outputs.json").exists()
    assert same(bench.train(**often), whole)
