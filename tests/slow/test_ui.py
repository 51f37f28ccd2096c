"""`posttrain ui` as a person uses it: both pages over the state that runs write at the same time, stopped by ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli import RECIPE, in_own_group, posttrain, processes_of, stages

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def ui(state: Path, prefect: int, mlflow: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a group of its own, once it has said that both pages answer."""
    log = state.parent / "ui.log"
    ports = ["--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    with log.open("w") as file:
        child = in_own_group(state, file, "ui", *ports)
    try:
        deadline = time.monotonic() + 180
        while "stops it all" not in log.read_text():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def fetch(address: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", "Accept": "text/html,*/*"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_both_pages_show_what_a_run_makes_meanwhile(tmp_path: Path) -> None:
    state, prefect, mlflow = tmp_path / "home", free_port(), free_port()
    state.mkdir()
    at_prefect, at_mlflow = f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}"
    with ui(state, prefect, mlflow) as child:
        said = (tmp_path / "ui.log").read_text()
        assert at_prefect in said
        assert f"{at_mlflow}/#/models" in said
        assert "<title>Prefect" in fetch(f"{at_prefect}/")
        assert json.loads(fetch(f"{at_prefect}/ui-settings"))["api_url"] == f"{at_prefect}/api"
        assert "<title>MLflow</title>" in fetch(f"{at_mlflow}/")

        ran = stages(posttrain(state, "run", RECIPE, "--json"))
        assert {stage["status"] for stage in ran.values()} == {"ran"}
        flows = json.loads(fetch(f"{at_prefect}/api/flow_runs/filter", {}))
        assert [(flow["name"], flow["state_type"]) for flow in flows] == [("tiny", "COMPLETED")]
        tasks = json.loads(fetch(f"{at_prefect}/api/task_runs/filter", {}))
        names = {task["id"]: task["name"] for task in tasks}
        arrows = {
            task["name"]: {names[made["id"]] for inputs in task["task_inputs"].values() for made in inputs} for task in tasks
        }
        assert set(names.values()) == set(ran)
        assert arrows["prompts"] == set()
        assert arrows["corpus"] == arrows["demonstrations"] == {"prompts"}
        assert arrows["sft"] == {"base", "demonstrations"}
        assert arrows["ppo"] == {"sft", "reward_model", "prompts", "ptx"}

        models = json.loads(fetch(f"{at_mlflow}/api/2.0/mlflow/registered-models/search?max_results=100"))
        assert {"tiny-ppo", "tiny-ppo-rollouts"} <= {model["name"] for model in models["registered_models"]}
        (version,) = json.loads(
            fetch(f"{at_mlflow}/api/2.0/mlflow/model-versions/search?filter=name%3D%27tiny-ppo%27&max_results=5")
        )["model_versions"]
        # Artifacts at `file:` locations, as the page asks for them.
        inputs = json.loads(fetch(f"{at_mlflow}/get-artifact?path=inputs.json&run_uuid={version['run_id']}"))
        assert inputs["policy"]["name"] == "tiny-sft"
        files = json.loads(fetch(f"{at_mlflow}/api/2.0/mlflow/artifacts/list?run_id={version['run_id']}&path=rollouts"))
        assert [file["path"] for file in files["files"]] == ["rollouts/data.parquet"]
        model = version["source"].removeprefix("models:/")
        config = fetch(f"{at_mlflow}/ajax-api/2.0/mlflow/logged-models/{model}/artifacts/files?artifact_file_path=config.json")
        assert json.loads(config)["model_type"] == "llama"

        # As a terminal does it: the signal goes to the whole group.
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 0
    said = (tmp_path / "ui.log").read_text()
    assert "Traceback" not in said
    assert not processes_of(state)


def test_a_server_that_dies_is_started_again(tmp_path: Path) -> None:
    state, prefect, mlflow = tmp_path / "home", free_port(), free_port()
    state.mkdir()
    with ui(state, prefect, mlflow) as child:
        (server,) = (path.parent for path in processes_of(state) if b"mlflow.server" in (path.parent / "cmdline").read_bytes())
        os.kill(int(server.name), signal.SIGKILL)
        deadline = time.monotonic() + 120
        while "the MLflow server ended with -9 and is started again" not in (tmp_path / "ui.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while True:
            try:
                assert fetch(f"http://127.0.0.1:{mlflow}/health") == "OK"
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert posttrain(state, "down").stdout == "stopped\n"
        assert child.wait(1) == 0
    assert not processes_of(state)
    assert posttrain(state, "down").stdout == f"nothing is up over {state}\n"


def test_a_taken_port_is_said_and_a_killed_command_leaves_nothing(tmp_path: Path) -> None:
    state, other, prefect, mlflow = tmp_path / "home", tmp_path / "other", free_port(), free_port()
    state.mkdir()
    with ui(state, prefect, mlflow) as child:
        done = posttrain(state, "ui", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
        assert done.returncode == 2
        assert done.stderr == f"error: {state}: servers or workers are up here already; `posttrain down` stops them\n"
        for ports, option in (((prefect, free_port()), "--prefect-port"), ((free_port(), mlflow), "--mlflow-port")):
            done = posttrain(other, "ui", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]))
            assert done.returncode == 2
            assert f"error: port {prefect if option == '--prefect-port' else mlflow} is taken" in done.stderr
            assert f"with {option}" in done.stderr
            assert done.stderr.count("\n") == 1
        assert len(processes_of(state)) == 3, "the command and two servers"
        child.kill()
        child.wait(10)
    deadline = time.monotonic() + 10
    while processes_of(state) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(state)
