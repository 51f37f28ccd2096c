"""`posttrain up` for tests: a control room of its own, and what a person or a cluster does to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from test_cli import in_own_group, posttrain, processes_of

Row = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What a condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except OSError:  # a server that is being started again
            pass
        assert time.monotonic() < deadline, f"{what} has not come within {seconds} s"
        time.sleep(0.5)


@dataclass
class Room:
    """A state folder, its servers and workers."""

    state: Path
    log: Path
    prefect_port: int = field(default_factory=free_port)
    mlflow_port: int = field(default_factory=free_port)

    @property
    def addresses(self) -> tuple[str, str]:
        return f"http://127.0.0.1:{self.prefect_port}", f"http://127.0.0.1:{self.mlflow_port}"

    def command(self, *arguments: str) -> str:
        """What the command said on stdout."""
        done = posttrain(self.state, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, recipe: Path, *settings: str) -> str:
        """Start a recipe on the pool control; its flow run's id."""
        arguments = [part for setting in settings for part in ("--set", setting)]
        said = self.command("run", str(recipe), "--detach", *arguments)
        return re.findall(r"[0-9a-f-]{36}", said)[-1]

    def api(self, path: str, body: Row | None = None) -> Any:
        """Prefect's API: POST with a body, else GET."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.addresses[0]}/api/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def flow_runs(self) -> list[Row]:
        return self.api("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 200})

    def children(self, parent: str) -> list[Row]:
        """The flow runs that a pipeline sent to pools, the first one first."""
        made = self.api("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent]}}, "sort": "START_TIME_ASC"})
        return list(made)

    def state_of(self, flow_run: str) -> str:
        return str(self.api(f"flow_runs/{flow_run}")["state_type"])

    def said(self, parent: str) -> str:
        """The log lines of the flow runs that a pipeline sent to pools."""
        sent = [run["id"] for run in self.children(parent)]
        lines = self.api("logs/filter", {"logs": {"flow_run_id": {"any_": sent}}, "limit": 200}) if sent else []
        return "\n".join(line["message"] for line in lines)

    def completed(self, flow_run: str, seconds: float = 300) -> None:
        """Wait for a pipeline's good end; a crash on the way is started again by the server."""
        ends = ("COMPLETED", "FAILED", "CANCELLED")
        wait_for(lambda: self.state_of(flow_run) in ends, seconds, f"the end of {flow_run}")
        run = self.api(f"flow_runs/{flow_run}")
        assert run["state_type"] == "COMPLETED", run["state"]

    def process_of(self, flow_run: str) -> list[int]:
        """The processes of a flow run."""
        mark = f"PREFECT__FLOW_RUN_ID={flow_run}\0".encode()
        return [int(path.parent.name) for path in processes_of(self.state) if mark in _read(path)]

    def processes(self, part: str) -> list[int]:
        """The room's processes whose command line has this in it."""
        found = [path.parent for path in processes_of(self.state)]
        return [int(path.name) for path in found if part in _read(path / "cmdline").replace(b"\0", b" ").decode()]

    def saved(self) -> list[Path]:
        """The states that stages have saved and still keep here."""
        return sorted(self.state.glob("runs/*/state/step-*"))

    def working(self) -> list[str]:
        """The flow runs that somebody works at, or is about to."""
        return [run["name"] for run in self.flow_runs() if run["state_type"] in ("RUNNING", "PENDING", "CANCELLING")]

    def mlflow(self, path: str, body: Row | None = None) -> Any:
        """MLflow's API: POST with a body, else GET."""
        data = None if body is None else json.dumps(body).encode()
        address = f"{self.addresses[1]}/api/2.0/mlflow/{path}"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def mlflow_search(self, condition: str) -> list[Row]:
        """MLflow's runs of a condition, the newest first."""
        ids = [one["experiment_id"] for one in self.mlflow("experiments/search?max_results=100")["experiments"]]
        body: Row = {"experiment_ids": ids, "filter": condition, "order_by": ["attributes.start_time DESC"]}
        return self.mlflow("runs/search", body).get("runs", [])

    def mlflow_runs(self, step: str) -> list[Row]:
        """MLflow's runs of a step, the newest first."""
        return self.mlflow_search(f"tags.`posttrain.step` = '{step}'")

    def artifact(self, run: Row, path: str) -> Any:
        """A JSON file of an MLflow run's artifacts."""
        folder = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        return json.loads((self.state / "artifacts" / folder / path).read_text())


@contextmanager
def room(folder: Path, *arguments: str, **settings: str) -> Iterator[Room]:
    """A control room that is up, with these settings in its environment; nothing of it is left after the block."""
    made = Room(folder / "state", folder / "up.log")
    made.state.mkdir(parents=True)
    with again(made, *arguments, **settings):
        yield made


@contextmanager
def again(made: Room, *arguments: str, **settings: str) -> Iterator[None]:
    """The same room, up once more."""
    ports = ["--prefect-port", str(made.prefect_port), "--mlflow-port", str(made.mlflow_port)]
    with made.log.open("w") as file, _up(made.state, file, [*ports, *arguments], settings) as child:
        wait_for(lambda: "stops it all" in made.log.read_text() or child.poll() is not None, 240, "posttrain up")
        assert child.poll() is None, made.log.read_text()
        yield


@contextmanager
def elsewhere(folder: Path, of: Room, *arguments: str, lost: bool = False) -> Iterator[Path]:
    """The state folder of workers that join a room from another machine, which is lost in the end or stopped."""
    state, log = folder / "elsewhere", folder / "elsewhere.log"
    state.mkdir(parents=True)
    join = ["--prefect", of.addresses[0], "--mlflow", of.addresses[1]]
    with log.open("w") as file, _up(state, file, [*join, *arguments], {}, lost) as child:
        wait_for(lambda: "stops it all" in log.read_text() or child.poll() is not None, 120, "a worker elsewhere")
        assert child.poll() is None, log.read_text()
        yield state


@contextmanager
def _up(
    state: Path, log: IO[str], arguments: list[str], settings: dict[str, str], lost: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    child = in_own_group(state, log, "up", *arguments, **settings)
    try:
        yield child
        assert child.poll() is None, "it ended by itself"
        if lost:
            return
        child.terminate()
        assert child.wait(120) == 0
        # What a stopped worker has left may take a moment to end.
        wait_for(lambda: not processes_of(state), 30, "the end of all its processes")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for path in processes_of(state):
            with suppress(ProcessLookupError):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return b""


def local(state: Path, *arguments: str) -> Row:
    """The steps by name of a run without servers."""
    state.mkdir(exist_ok=True)
    done = posttrain(state, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
