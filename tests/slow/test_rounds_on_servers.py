"""Rounds as they are meant: on a schedule, through a kill, and with people between two starts."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from playwright.sync_api import Browser
from room import Room, Row, room, wait_for
from test_kills_on_pools import tags
from test_people import downloaded, label_one, opened, place, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Room]:
    with room(folder, "--workers", "control,cpu") as made:
        yield made


def records(up: Room, recipe: str) -> list[Row]:
    """The rounds of a recipe, the first one first."""
    made = [tags(run) for run in up.mlflow_search(f"tags.`posttrain.rounds` = '{recipe}'")]
    return sorted((json.loads(found["posttrain.round"]) for found in made), key=lambda one: one["number"])


def ended(up: Room, recipe: str) -> list[Row]:
    return [one for one in records(up, recipe) if one["state"] in ("promoted", "kept")]


def champion(up: Room, name: str) -> str | None:
    return up.mlflow(f"registered-models/alias?name={name}&alias=champion")["model_version"]["version"]


def test_three_scheduled_rounds_through_a_kill(up: Room) -> None:
    """The second round's process is killed while it trains: the same round goes on. Then a gate that fails."""
    recipe = "configs/rounds-quickstart.yaml"
    named = up.command("deploy", recipe, "--every", "40s", "--seed", "1", "--set", "pools.evaluate=cpu").strip()
    assert named == "rounds/rounds-quickstart"
    wait_for(lambda: len(records(up, "rounds-quickstart")) == 2, 400, "the second round")
    wait_for(lambda: list(up.state.glob("runs/*/events.jsonl")), 120, "a step of it")
    (running,) = [run for run in up.flow_runs() if run["state_type"] == "RUNNING" and run["name"] == "rounds-quickstart"]
    for process in up.process_of(running["id"]):
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: len(ended(up, "rounds-quickstart")) >= 3, 600, "the end of the third round")
    deployment = up.api(f"deployments/name/{named}")["id"]
    up.api(f"deployments/{deployment}/pause_deployment", {})
    killed = up.api(f"flow_runs/{running['id']}")
    print(f"the killed start: {killed['state_name']}, begun {killed['run_count']} times")

    rounds = ended(up, "rounds-quickstart")[:3]
    assert [(one["number"], one["start"], one["count"]) for one in rounds] == [(1, 0, 120), (2, 120, 120), (3, 240, 120)]
    figures = [one["outcome"]["figures"] for one in rounds if one["state"] == "promoted"]
    assert figures[0]["champion.accuracy"] + 0.1 < figures[-1]["accuracy"]
    labels = [one["outcome"]["figures"]["labels"] for one in rounds]
    assert labels == sorted(set(labels))
    for one in rounds:
        found, what = one["outcome"]["figures"], f"{one['state']}: {one['why']}"
        numbers = ("labels", "pair_accuracy", "champion.accuracy", "accuracy", "win_rate", "kl")
        print(one["number"], {name: round(found[name], 3) for name in numbers}, what)

    # None began before the one before it had ended.
    runs = sorted(up.mlflow_search("tags.`posttrain.rounds` = 'rounds-quickstart'"), key=lambda run: run["info"]["start_time"])
    times = [(run["info"]["start_time"], run["info"].get("end_time")) for run in runs]
    assert all(before[1] is not None and before[1] <= after[0] for before, after in itertools.pairwise(times))

    # A scheduled start may have begun just before the schedule was paused.
    wait_for(lambda: not up.working(), 300, "the last scheduled round")
    before = champion(up, "rounds-quickstart-champion")
    up.completed(up.submit(Path(recipe), "gate.max_kl=0.001", "seed=1"), 300)
    last = records(up, "rounds-quickstart")[-1]
    assert last["state"] == "kept"
    assert "(at most 0.001 allowed)" in last["why"]
    assert champion(up, "rounds-quickstart-champion") == before


def test_a_round_that_people_label(up: Room, folder: Path, browser: Browser) -> None:
    values: dict[str, Any] = yaml.safe_load((ROOT / "tests/tiny/rounds.yaml").read_text())
    del values["labels"]
    values |= {"name": "asked", "questions": {"limit": 20}, "answers": {"heldout": 0.2}, "stream": {"per_round": 24}}
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(values))
    first = up.submit(path)
    up.completed(first)
    assert up.api(f"flow_runs/{first}")["state_name"] == "AwaitingLabels"
    assert [one["state"] for one in records(up, "asked")] == ["awaiting_labels"]
    assert not up.working(), "nobody holds a worker or a slot"
    second = up.submit(path)
    up.completed(second)
    assert up.api(f"flow_runs/{second}")["state_name"] == "AwaitingLabels"

    (page_file,) = up.state.glob("artifacts/asked/*/artifacts/questions/page.html")
    watched: list[str] = []
    page = opened(browser.new_context(), page_file, watched)
    start(page, "Tess")
    for number in range(20):
        label_one(page, number)
    assert len(downloaded(page, folder / "saved")) == 20
    assert not watched
    page.screenshot(path=folder / "labelled.png")
    assert place(page)
    answers = [str(file) for file in (folder / "saved").glob("*.jsonl")]

    went_on = up.command("label", str(path), *answers, "--detach").strip().rsplit("/", 1)[-1]
    up.completed(went_on)
    (one,) = records(up, "asked")
    assert one["state"] == "promoted", one["why"]
    (made,) = [run for run in up.mlflow_runs("answers") if tags(run)["posttrain.recipe"] == "asked"]
    metrics = {metric["key"]: metric["value"] for metric in made["data"]["metrics"]}
    assert metrics["answers"] == 20
    assert metrics["rows_train"] + metrics["rows_heldout"] == 20
    (learned,) = [run for run in up.mlflow_runs("reward_model") if tags(run)["posttrain.recipe"] == "asked"]
    assert learned["info"]["status"] == "FINISHED"
    inputs = up.artifact(learned, "inputs.json")
    assert inputs["train"]["name"] == "asked-preferences-train"
    assert up.artifact(learned, "manifests/checkpoint.json")["kind"] == "model"
