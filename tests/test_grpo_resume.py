"""GRPO dies in any phase of any step, and ends in the bytes of a run that did not."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import grpo_bench
import pytest
import torch
from conftest import request_for
from grpo_bench import CONFIG, Bench, train
from ppo_bench import CrashError, Folders, digests, events, folder, killed, merged, metrics, same, series, until_done

import stages.grpo
from stages.errors import InputError
from stages.request import run_stage
from stages.run import Event, Run

folders = grpo_bench.folders
bench = grpo_bench.bench
rewards_of_tests = grpo_bench.rewards_of_tests

# What a child knows of rewards: half of the prompts get no spread, for whose groups others are sampled.
PARTS = [
    {"name": "length", "weight": 50.0, "where": {"kind": "chat"}},
    {"name": "answer", "where": {"kind": "sum"}},
]
ONE: dict[str, Any] = {"steps": 3, "optimizer": {"schedule": "linear"}, "rewards": PARTS, "sampling": {"temperature": 0.9}}
SEVERAL = ONE | {"epochs": 2, "minibatches": 2, "refill": {"rounds": 2}, "reference_kl": {"coefficient": 0.1}}
CONFIGS = {"one": ONE, "several": SEVERAL}


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory, rewards_of_tests: None) -> dict[str, Run]:
    """Runs that nothing interrupts."""
    return {name: train(folders, tmp_path_factory.mktemp("whole"), **config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_config_gives_the_same_bytes(bench: Bench, whole: dict[str, Run], name: str) -> None:
    files = {"checkpoint/model.safetensors", "rollouts/data.parquet"}
    assert files <= digests(whole[name]).keys()
    assert same(bench.train("again", **CONFIGS[name]), whole[name])
    assert len(bench.sampled) == (3 if name == "one" else 9), "each step of the second needs all its rounds"
    assert ("logp" in {what for step, what in bench.measured if step}) == (name == "several")
    changed = digests(bench.train("other", seed=1, **CONFIGS[name]))
    assert all(changed[file] != digests(whole[name])[file] for file in files)
    assert series(whole[name], "lr") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert [(event["done"], event["total"]) for event in events(whole[name], "progress")] == [(1, 3), (2, 3), (3, 3)]


# Each step fails once at a place. With save_every 1 there is a state after each sampling and after each step's updates; with 2
# for the second and the last step alone: until there is one, the stage starts anew. Then the steps that are sampled.
CRASHES = [
    ("one", "collect", 1, [0, 1, 2]),
    ("one", "_judge", 1, [0, 0, 1, 1, 2, 2]),
    ("one", "optimization_step", 1, [0, 1, 2]),
    ("one", "state", 1, [0, 1, 2]),
    ("one", "state", 2, [0, 1, 2]),
    ("several", "collect", 1, [0, 1, 2]),
    ("several", "optimization_step", 1, [0, 1, 2]),
    ("several", "state", 1, [0, 1, 2]),
    ("several", "collect", 2, [0, 0, 1, 2]),
    ("several", "_judge", 2, [0, 0, 1, 0, 1, 2, 2]),
    ("several", "optimization_step", 2, [0, 0, 1, 2]),
    ("several", "state", 2, [0, 1, 2]),
]


@pytest.mark.parametrize(("name", "place", "save_every", "sampled"), CRASHES)
def test_a_run_that_fails_in_every_step_ends_as_one_that_does_not(
    bench: Bench, whole: dict[str, Run], name: str, place: str, save_every: int, sampled: list[int]
) -> None:
    calls: Counter[Any] = Counter()
    # The last of a step's rounds, or the third of its four updates.
    last = {"collect": 3, "optimization_step": 3}.get(place, 1) if name == "several" else 1

    def crash(*given: Any) -> None:
        step = {"collect": lambda: given[5], "_judge": lambda: given[2].step}.get(place, lambda: given[7]().split(",")[0])()
        calls[step] += 1
        if calls[step] == last:
            raise CrashError

    def heard(event: Event) -> None:
        if place == event["event"] == "state":
            raise CrashError

    if place != "state":
        bench.spy(place, before=crash)
    run, crashes = until_done(lambda: bench.train("run", heard, runtime={"save_every": save_every}, **CONFIGS[name]))
    saved = [event["step"] for event in events(run, "state")]
    assert saved == ([0, 1, 1, 2, 2, 3] if save_every == 1 else [1, 2, 2, 3])
    assert crashes == (len(saved) if place == "state" else 3)
    assert same(run, whole[name])
    assert bench.complete == sampled


def test_killed_children_resume_to_the_same_bytes(bench: Bench, whole: dict[str, Run]) -> None:
    requests, left = [], []
    inputs = {port: bench.folders[port] for port in ("policy", "prompts")}
    for name, changes in CONFIGS.items():
        config = merged(merged(CONFIG, changes), {"runtime": {"save_every": 1}})
        requests.append(request_for("grpo", folder(bench.path / name), config, **inputs))
    # The first is killed while it samples, after its second state; the other one between its updates, after its first.
    killed(requests, (2, 1))
    for name, request in zip(CONFIGS, requests, strict=True):
        # The completions that are in the state are not sampled again.
        state = max((request.folder / "state").glob("step-*"))
        left += range(int(state.name[5:13]) + (state / "rollouts.json").is_file(), 3)
        assert digests(run_stage(request)) == digests(whole[name])
    assert bench.complete == left


def test_a_look_at_the_samplers_log_probs_outlives_a_crash(bench: Bench) -> None:
    """Whether they agree is part of the state: a run that resumes uses what the other one used."""
    expected = bench.train("whole", **ONE)
    measured, bench.measured = bench.measured, []

    def heard(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    run, _ = until_done(lambda: bench.train("run", heard, **merged(ONE, {"runtime": {"save_every": 1}})))
    assert same(run, expected)
    assert bench.measured == measured == [(0, "logp"), *((step, "ref_logp") for step in range(3))]


@pytest.mark.parametrize(("function", "update"), [("policy_loss", 6), ("kl_loss", 4)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    bench: Bench, whole: dict[str, Run], function: str, update: int
) -> None:
    original, often = getattr(stages.grpo, function), merged(SEVERAL, {"runtime": {"save_every": 1}})
    with bench.patch.context() as patch:
        nan = lambda *given: original(*given) * (math.nan if len(bench.updates) == update + 1 else 1)  # noqa: E731
        patch.setattr(stages.grpo, function, nan)
        with pytest.raises(InputError, match="loss is nan") as caught:
            bench.train(**often)
    last, moment = bench.updates[-1], bench.moments[-1]
    head, names = str(caught.value).split("]")[0].split("[")
    assert head == "step 2, prompts "
    rows = [moment.rollouts.samples[index].row["id"] for index in last.chosen]
    assert names.replace("'", "").split(", ") == sorted(set(rows))
    before = last.policy.parameters()
    assert all(torch.equal(one, other) for one, other in zip(bench.loop.policy.model.parameters(), before, strict=True))
    [state] = (bench.path / "run" / "state").iterdir()
    assert state.name.startswith("step-00000001")
    assert not (bench.path / "run" / "outputs.json").exists()
    assert list(metrics(Run(bench.path / "run", {}))) == [1]
    assert same(bench.train(**often), whole["several"])
