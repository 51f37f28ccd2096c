"""`posttrain up`: servers and workers over the state folder, until ctrl-C or `posttrain down`.

    .posttrain/up.json          who is up, and where: commands over the same state then use its servers
               up.lock          held while it is
               logs/NAME.log

On another machine `posttrain up --workers gpu` with the addresses of both servers adds a worker, which shares no disk with
them.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows import guard
from flows.children import Child, keep_alive, until_stopped
from flows.flow_process import LOG
from flows.guard import LOOPBACK
from flows.pool_file import CONTROL, DockerPool, PoolFile, Servers
from flows.processes import stop_left
from flows.server import MLFLOW, PREFECT, mlflow_settings, prefect_settings, refuse_taken, uvicorn, wait_until_answered
from stages.errors import InputError
from tasks.credentials import PASSWORD, USER, Credentials, check
from tasks.home import is_up, use_servers
from tasks.lease import GPUS

POOLS = {
    CONTROL: "Pipelines. They wait for their steps, which run on the other pools or within them.",
    "cpu": "Steps that need no GPU.",
    "gpu": "Steps that need a GPU: one worker a set of GPUs, one step at a time each.",
}
WORKER = {"PREFECT_WORKER_QUERY_SECONDS": "2"}
DOWN_SECONDS = 120.0


@dataclass(frozen=True)
class Up:
    """What to bring up: `servers` here at these ports, or those at addresses that are given; workers of these pools."""

    host: str = LOOPBACK
    prefect_port: int = 4200
    mlflow_port: int = 5000
    prefect: str | None = None
    mlflow: str | None = None
    pools: Sequence[str] = ()
    gpus: Sequence[str] | None = None
    file: PoolFile = field(default_factory=PoolFile)

    @property
    def joins(self) -> bool:
        """Whether the servers are somebody else's."""
        return self.prefect is not None

    @property
    def addresses(self) -> tuple[str, str]:
        """Prefect's and MLflow's, as this machine reaches them."""
        return self._at(guard.nearby(self.host))

    @property
    def told(self) -> tuple[str, str]:
        """The same, as other machines reach them."""
        return self._at(guard.afar(self.host))

    def _at(self, host: str) -> tuple[str, str]:
        return (self.prefect or guard.url(host, self.prefect_port), self.mlflow or guard.url(host, self.mlflow_port))


def up(root: Path, asked: Up, say: Callable[[str], None]) -> None:
    """Bring all of it up, say where, keep it alive until a signal, and stop it: workers first.

    Raises InputError when a port is taken, somebody is up over this state already, or others could reach servers that ask for
    no password; RuntimeError when a server does not start.
    """
    prefect, mlflow = asked.addresses
    known = guard.required(LOOPBACK if asked.joins else asked.host)
    for_jobs = asked.file.servers or Servers(prefect=asked.told[0], mlflow=asked.told[1])
    asked.file.check(for_jobs, guarded=known is not None)
    with only_one(root) as record, until_stopped(), ExitStack() as stack:
        servers = [] if asked.joins else _servers(root, asked, known)
        _start(stack, servers)
        for address, child in zip((f"{prefect}/api/health", f"{mlflow}/health"), servers or (None, None), strict=True):
            wait_until_answered(address, child.log if child else None, child.process if child else None)
        check(f"{prefect}/api", mlflow)
        artifacts = None if asked.joins else str(root / "artifacts")
        use_servers(prefect, mlflow, artifacts)
        draft = record.with_suffix(".draft")
        draft.write_text(json.dumps({"pid": os.getpid(), "prefect": prefect, "mlflow": mlflow, "artifacts": artifacts}))
        draft.replace(record)
        serves = not asked.joins and bool(asked.pools or asked.file.pools)
        if serves:
            from flows.deploy import deploy

            deploy(Path.cwd(), asked.file, for_jobs)
        # Prefect takes seconds to import, and reads the environment then.
        from flows.keeper import keep, leave

        stack.callback(leave, root)
        keep(root, say, _of_processes(asked.file) if serves else None)
        workers = _workers(root, asked)
        _start(stack, workers)
        shown = asked.told
        say(f"Prefect, what runs and ran:     {shown[0]}")
        say(f"MLflow, what was made:          {shown[1]}")
        say(f"  every checkpoint and dataset: {shown[1]}/#/models")
        if known is not None and not asked.joins:
            say(f"both ask for the user of ${USER} and ${PASSWORD}; Prefect's page for the two with a colon between them")
        if workers:
            say(f"workers: {', '.join(worker.name for worker in workers)}")
        say("ctrl-C or `posttrain down` stops it all")
        keep_alive([*servers, *workers], say)


def down(root: Path) -> bool:
    """Stop what is up over this state and wait for its end, or what an `up` that was killed has left; False when there is
    nothing."""
    found = is_up(root)
    if found is None:
        return stop_left(root) > 0
    os.kill(found["pid"], signal.SIGTERM)
    deadline = time.monotonic() + DOWN_SECONDS
    while is_up(root) is not None:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"process {found['pid']} has not ended within {DOWN_SECONDS:.0f} s; its logs are in {root / 'logs'}"
            )
        time.sleep(0.2)
    return True


@contextmanager
def only_one(root: Path) -> Iterator[Path]:
    """The record of who is up, for the length of the block. Raises InputError when somebody is, over the same state."""
    with (root / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{root}: servers or workers are up here already; `posttrain down` stops them") from None
        try:
            yield root / "up.json"
        finally:
            (root / "up.json").unlink(missing_ok=True)


def gpu_sets() -> list[str]:
    """One set for each GPU of this machine; an empty one where there is no GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return [""]
    return [str(number) for number, _ in enumerate(done.stdout.splitlines())] or [""]


def _start(stack: ExitStack, children: Sequence[Child]) -> None:
    for child in children:
        child.start()
        stack.callback(child.stop)


def _servers(root: Path, asked: Up, known: Credentials | None) -> list[Child]:
    refuse_taken(asked.host, asked.prefect_port, "--prefect-port")
    refuse_taken(asked.host, asked.mlflow_port, "--mlflow-port")
    for_prefect, for_mlflow = guard.settings(root, asked.host, asked.mlflow_port, known)
    at_prefect, at_mlflow = prefect_settings(root, asked.addresses[0]) | for_prefect, mlflow_settings(root) | for_mlflow
    prefect = uvicorn(PREFECT, asked.host, asked.prefect_port)
    mlflow = uvicorn(MLFLOW if known is None else guard.MLFLOW, asked.host, asked.mlflow_port)
    return [
        Child("the Prefect server", prefect, at_prefect, root / "logs" / "prefect.log"),
        Child("the MLflow server", mlflow, at_mlflow, root / "logs" / "mlflow.log"),
    ]


def _workers(root: Path, asked: Up) -> list[Child]:
    """One worker a pool; of `gpu` one a set of GPUs, which takes one step at a time."""
    made = []
    for pool in asked.pools:
        on = asked.file.pools.get(pool)
        process = on is None or on.type == "process"
        sets = (gpu_sets() if asked.gpus is None else asked.gpus) if pool == "gpu" and process else [None]
        # Two containers at once would have the same GPUs; a cluster gives each job its own.
        alone = pool == "gpu" if process else isinstance(on, DockerPool) and on.gpus > 0
        for number, devices in enumerate(sets):
            name = f"{socket.gethostname()}-{pool}" + (f"-{number}" if number else "")
            kind = "process" if on is None else on.type
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", kind, "--name", name]
            log = root / "logs" / f"{name}.log"
            settings = {**WORKER, "PATH": _path(), LOG: str(log)}
            if devices is not None:
                settings |= {"CUDA_VISIBLE_DEVICES": devices, GPUS: devices}
            elif pool == "cpu" and process:
                # A step that takes what it finds had better not find a GPU, which a step of `gpu` has to itself.
                settings["CUDA_VISIBLE_DEVICES"] = ""
            made.append(Child(name, command + ["--limit", "1"] * alone, settings, log))
    return made


def _of_processes(file: PoolFile) -> set[str]:
    """The pools whose steps are processes of their workers' machines."""
    return (POOLS.keys() - file.pools.keys()) | {name for name, pool in file.pools.items() if pool.type == "process"}


def _path() -> str:
    """Where a worker finds the `python` that runs this."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
