"""Real servers that ask who is there: nobody else gets in, a worker elsewhere does, and the password lies nowhere."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from test_cli import COMMAND, ROOT, environment_for  # pyright: ignore[reportMissingImports]

from tasks.credentials import PASSWORD, USER, Credentials

pytestmark = pytest.mark.slow
ADA = Credentials("ada", "correct horse % battery: staple")
EVE = Credentials("eve", "another horse, another staple")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
RECIPE = "flow: prepare\nname: {name}\ninputs: {{source: '{source}'}}\nprepare: {{rows: 40, heldout: 0.5}}\n"
POOLS = """
servers: {{prefect: http://head:4200, mlflow: http://head:5000}}
pools:
  gpu: {{type: kubernetes, image: "posttrain:1", gpus: 1, credentials: posttrain/login}}
  eval: {{type: docker, image: "posttrain:1", directory: {directory}}}
"""
# What a worker on Docker does until it starts a container: the command and the environment of one for the next step.
DOCKER_WORKER = """
import asyncio, json
from prefect import get_client
from prefect_docker.worker import DockerWorker

async def main():
    async with get_client() as client:
        while not (waiting := await client.get_scheduled_flow_runs_for_work_pool("eval")):
            await asyncio.sleep(0.5)
        made = await DockerWorker.job_configuration.resolve_for_flow_run(
            waiting[0].flow_run, client=client, work_pool=await client.read_work_pool("eval"), worker_name="worker"
        )
        print(json.dumps([made.command, made.env]))

asyncio.run(main())
"""
# Of Prefect's server, then of MLflow's: what is behind a page, a form, an artifact, a socket.
ASKED = [
    ["/api/version", "/api/admin/settings", "/api/deployments/name/step/cpu", "/api/events/filter"],
    ["/", "/version", "/api/2.0/mlflow/experiments/search?max_results=1", "/api/2.0/mlflow-artifacts/artifacts?path=small"],
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(state: Path, known: Credentials | None, **besides: str) -> dict[str, str]:
    named = {} if known is None else {USER: known.user, PASSWORD: known.password}
    return environment_for(state) | named | besides


def posttrain(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@contextmanager
def up(environment: dict[str, str], *arguments: str) -> Iterator[str]:
    """The command in a group of its own; what it said when all was up."""
    log = Path(environment["POSTTRAIN_HOME"]).parent / f"{time.monotonic_ns()}.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            [*COMMAND, "up", *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file, process_group=0
        )
    try:
        deadline = time.monotonic() + 180
        while "ctrl-C" not in log.read_text():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield log.read_text()
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def fetch(address: str, known: Credentials | None) -> bytes:
    request = urllib.request.Request(address)
    if known is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(known.pair.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def status(address: str, known: Credentials | None = None) -> int:
    try:
        fetch(address, known)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def see_pages(prefect: str, mlflow: str) -> None:
    """Both pages as a browser shows them to somebody who knows the password."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(http_credentials={"username": ADA.user, "password": ADA.password})
        page.goto(f"{mlflow}/#/models")
        page.get_by_text("small-prepare-train").wait_for()
        page = browser.new_page()
        page.goto(prefect)
        page.locator("input").fill(ADA.pair)
        page.keyboard.press("Enter")
        page.goto(f"{prefect}/v2/runs")
        page.get_by_text("small").first.wait_for()
        browser.close()


def run_as_a_container(folder: Path, here: dict[str, str], prefect: str, mlflow: str) -> None:
    """A step on the pool of Docker, in a process with nothing but what its container would have."""
    recipe = folder / "contained.yaml"
    text = RECIPE.format(name="contained", source="procedural:chain-sum/prompts") + "pools: {default: eval}\n"
    recipe.write_text(text.replace("rows: 40", "rows: 30"))  # else it is there already
    pipeline = subprocess.Popen([*COMMAND, "run", str(recipe)], cwd=ROOT, env=here, stderr=subprocess.PIPE, text=True)
    try:
        worker = environment_for(folder / "worker") | {"PREFECT_API_URL": f"{prefect}/api", "PREFECT_API_AUTH_STRING": EVE.pair}
        said = subprocess.run([sys.executable, "-c", DOCKER_WORKER], env=worker, capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stderr
        command, env = json.loads(said.stdout)
        # As names are found in the container's network.
        found = {
            name: text.replace("http://head:4200", prefect).replace("http://head:5000", mlflow) for name, text in env.items()
        }
        directory = Path(found["POSTTRAIN_HOME"])
        directory.mkdir()
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(directory)}
        ran = subprocess.run(
            command.split(), cwd=directory, env=path | found, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert "prepare: ran in" in ran.stdout + ran.stderr
        assert pipeline.wait(120) == 0, pipeline.communicate()[1]
    finally:
        pipeline.kill()
        pipeline.communicate()


def test_one_user_is_let_in(tmp_path: Path) -> None:
    ports = (free_port(), free_port())
    servers = prefect, mlflow = tuple(f"http://127.0.0.1:{port}" for port in ports)
    placed = ["--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    here, worker, third = tmp_path / "here" / "state", tmp_path / "worker" / "state", tmp_path / "third" / "state"
    for folder in (here, worker, third):
        folder.parent.mkdir()
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(RECIPE.format(name="small", source="procedural:chain-sum/prompts") + "pools: {default: cpu}\n")
    second.write_text(RECIPE.format(name="again", source="datasets:/small-prepare-train/1"))
    joining = {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow}

    with up(environment(here, ADA), "--workers", "control", *placed) as said:
        assert ADA.password not in said
        for server, paths in zip(servers, ASKED, strict=True):
            for path in paths:
                assert [status(server + path), status(server + path, EVE)] == [401, 401], path
        stranger = posttrain(environment(here, None), "artifacts")
        assert (stranger.returncode, stranger.stderr.count("\n")) == (2, 1), stranger.stderr
        assert f"asks who is there: set {USER} and {PASSWORD} in the environment" in stranger.stderr
        stranger = posttrain(environment(third, EVE, **joining), "run", str(second))
        assert stranger.returncode == 2
        assert f"does not let in the user of {USER}" in stranger.stderr.splitlines()[-1]
        with up(environment(worker, ADA, **joining), "--workers", "cpu"):
            seen = subprocess.run(["ps", "-ww", "-e", "-o", "args"], capture_output=True, text=True, check=True).stdout
            assert "prefect worker start" in seen
            assert ADA.password not in seen
            # The worker puts its artifact through the MLflow server; the third state, which has nothing, gets it there.
            ran = posttrain(environment(here, ADA), "run", str(first), "--json")
            assert ran.returncode == 0, ran.stderr
            fetched = posttrain(environment(third, ADA, **joining), "run", str(second), "--json")
            assert fetched.returncode == 0, fetched.stderr
            digest = json.loads(ran.stdout)["stages"][0]["artifacts"]["train"]["digest"]
            assert [(state / "cache" / digest[:32]).is_dir() for state in (worker, third)] == [True, True]
        see_pages(prefect, mlflow)
    assert "prepare: ran in" in next((worker / "logs").glob("*-cpu.log")).read_text()
    # Databases, logs, caches, requests of stages: the password is in none of them.
    files = [file for folder in (here, worker, third) for file in folder.parent.rglob("*") if file.is_file()]
    assert {"prefect.db", "mlflow.db", "users.db", "mlflow.log", "prefect.log"} <= {file.name for file in files}
    secrets = [text.encode() for text in (ADA.password, base64.b64encode(ADA.pair.encode()).decode().rstrip("="))]
    assert [file for file in files if any(secret in file.read_bytes() for secret in secrets)] == []

    elsewhere = tmp_path / "pools.yaml"
    elsewhere.write_text(POOLS.format(directory=tmp_path / "container"))
    with up(environment(here, EVE), "--workers", "none", "--pools", str(elsewhere), *placed):
        for server, paths in zip(servers, ASKED, strict=True):
            assert [status(server + paths[1], one) for one in (None, ADA, EVE)] == [401, 401, 200]
        # A pool that was of processes is of another platform now, and takes steps as before.
        platforms = {"control": "process", "cpu": "process", "gpu": "kubernetes", "eval": "docker"}
        for pool, platform in platforms.items():
            made = json.loads(fetch(f"{prefect}/api/work_pools/{pool}", EVE))
            assert made["type"] == platform
            assert EVE.password not in json.dumps(made)
            if pool != "control":
                assert json.loads(fetch(f"{prefect}/api/deployments/name/step/{pool}", EVE))["work_pool_name"] == pool
        run_as_a_container(tmp_path, environment(here, EVE), prefect, mlflow)
        listed = posttrain(environment(here, EVE), "artifacts")
        assert listed.returncode == 0, listed.stderr
        assert "again-prepare-train" in listed.stdout
        assert "contained-prepare-train" in listed.stdout
    assert not (here / "up.json").exists()
