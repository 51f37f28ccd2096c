"""What clusters do, while a step runs on a pool: each time the pipeline ends right, and nothing is computed twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import INIT, ROOT
from room import Room, Row, again, local, room, wait_for

pytestmark = pytest.mark.slow

RECIPE = {
    "flow": "sft",
    "name": "killed",
    "inputs": {"model": f"init:{INIT.relative_to(ROOT)}", "train": "datasets:/killed-rows-prepare-train/1"},
    "pools": {"sft": "gpu"},
    "sft": {
        "steps": 1500,
        "batch_size": 8,
        "optimizer": {"lr": 1e-3},
        "sampling": {"max_new_tokens": 8},
        "generations": 4,
        "runtime": {"save_every": 100, "log_every": 10, "device": "cpu", "threads": 1},
    },
}
ROWS = {
    "flow": "prepare",
    "name": "killed-rows",
    "inputs": {"source": "procedural:chain-sum/demonstrations"},
    "prepare": {"rows": 80},
}
VICTIMS = ["the parent", "the child", "the worker", "the worker and the child", "the Prefect server", "the MLflow server"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    for name, values in (("rows", ROWS), ("killed", RECIPE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / "killed.yaml"


@pytest.fixture(scope="module")
def undisturbed(folder: Path, recipe: Path) -> Callable[[int], str]:
    """The digest of the checkpoint that a run of a seed makes without servers."""
    local(folder / "local", "run", str(folder / "rows.yaml"))

    def digest(seed: int) -> str:
        steps = local(folder / "local", "run", str(recipe), "--set", "pools={}", "--seed", str(seed))
        return steps["sft"]["artifacts"]["checkpoint"]["digest"]

    return digest


@pytest.fixture(scope="module")
def up(folder: Path, recipe: Path) -> Iterator[Room]:
    with room(folder) as made:
        made.command("run", str(folder / "rows.yaml"))
        yield made


def victims(up: Room, what: str, parent: str, child: str) -> list[int]:
    worker = "worker start --pool gpu"
    return {
        "the parent": lambda: up.process_of(parent),
        "the child": lambda: up.process_of(child),
        "the worker": lambda: up.processes(worker),
        "the worker and the child": lambda: up.processes(worker) + up.process_of(child),
        "the Prefect server": lambda: up.processes("flows.prefect_api:create_app"),
        "the MLflow server": lambda: up.processes("mlflow.server.fastapi_app"),
    }[what]()


@pytest.mark.parametrize("what", VICTIMS)
def test_killed_while_a_step_runs_on_a_pool(
    up: Room, recipe: Path, undisturbed: Callable[[int], str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = VICTIMS.index(what)
    parent = up.submit(recipe, f"seed={seed}")
    wait_for(up.saved, 240, "a saved state")
    (child,) = [run["id"] for run in up.children(parent)]
    killed = victims(up, what, parent, child)
    assert killed
    for process in killed:
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    up.completed(parent, 400)
    took = time.monotonic() - began

    runs = [run for run in up.mlflow_runs("sft") if tags(run)["posttrain.pipeline"] == parent]
    assert len(runs) == 1, "one run computed it, with whatever pauses"
    assert runs[0]["info"]["status"] == "FINISHED"
    assert tags(runs[0])["posttrain.status"] == ("resumed" if "child" in what else "ran")
    if "child" in what:
        assert undisturbed(seed) in tags(runs[0])["posttrain.outputs"], "the bytes of a run that nothing disturbed"
    assert not up.saved()
    # Nothing is left that says that it runs.
    assert up.working() == []
    children = ", ".join(run["state_name"] for run in up.children(parent))
    assert "child" in what or children == "Completed", "who goes on unharmed is not started again"
    starts = up.api(f"flow_runs/{parent}")["run_count"]
    with capsys.disabled():
        print(f"\n{what:<26} parent started {starts} times; children: {children:<20}; all ended right {took:.0f} s later")


def test_cancelled_when_its_worker_is_gone(up: Room, recipe: Path) -> None:
    """The step hears of it by itself; what the new worker is given meanwhile waits for the GPUs."""
    parent = up.submit(recipe, "seed=20", "sft.steps=30000", "launch.mode=process")
    wait_for(up.saved, 240, "a saved state")
    (child,) = [run["id"] for run in up.children(parent)]
    (worker,) = up.processes("worker start --pool gpu")
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: set(up.processes("worker start --pool gpu")) - {worker}, 60, "another worker")
    other = up.submit(recipe, "seed=21")
    wait_for(lambda: "another step has the GPUs" in up.said(other), 120, "the wait for the GPUs")
    assert len(up.processes("-m stages")) == 1
    up.api(f"flow_runs/{parent}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for(lambda: not up.process_of(child) and not up.processes("-m stages"), 60, "the end of the training process")
    for run in (parent, child):
        wait_for(lambda run=run: up.state_of(run) == "CANCELLED", 60, "the state Cancelled")
    assert [path for path in up.saved() if path.is_dir()], "what it has saved is kept"
    up.completed(other)
    assert up.working() == []


def test_down_and_up_again_while_a_step_runs(folder: Path, recipe: Path, undisturbed: Callable[[int], str]) -> None:
    """Nothing says Running that does not run; what was stopped goes on by itself."""
    with room(folder / "twice") as made:
        made.command("run", str(folder / "rows.yaml"))
        parent = made.submit(recipe, "seed=22")
        wait_for(made.saved, 240, "a saved state")
        (child,) = [run["id"] for run in made.children(parent)]
    with sqlite3.connect(made.state / "prefect" / "prefect.db") as database:
        told = dict(database.execute("select name, state_type from flow_run where id in (?, ?)", (parent, child)).fetchall())
    assert told == {"killed": "CRASHED", "sft": "CRASHED"}
    with again(made):
        began = time.monotonic()
        made.completed(parent, 400)
        print(f"down and up again: all ended right {time.monotonic() - began:.0f} s later")
        (run,) = made.mlflow_runs("sft")
        assert (run["info"]["status"], tags(run)["posttrain.status"]) == ("FINISHED", "resumed")
        assert undisturbed(22) in tags(run)["posttrain.outputs"]
        assert made.working() == []


def tags(run: Row) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
