"""Runs a stage's request: in this process, or in child processes that are followed by their event file."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.errors import InputError
from stages.request import Request, run_stage
from stages.run import Event, Listener
from stages.specs import STAGES, Config

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


class Launch(Config):
    """How a recipe's stages are started. Not identity."""

    mode: Literal["in_process", "process"] = Field(
        default="in_process", title="Mode", description="in_process: here; process: a child `python -m stages` for each stage."
    )
    processes: int = Field(default=1, ge=1, title="Processes", description="Ranks of a child, started by torchrun (one a GPU).")
    accelerate_config: str | None = Field(
        default=None,
        title="Accelerate config",
        description="A config file for `accelerate launch` (DDP, FSDP, DeepSpeed); replaces torchrun.",
    )
    retries: int = Field(
        default=0, ge=0, title="Retries", description="How often Prefect retries a step that failed; it resumes from its state."
    )
    worker_timeout: int = Field(
        default=600, ge=1, title="Wait for a worker", description="Seconds that a step waits for a work pool to have a worker."
    )


def launch(request: Request, how: Launch, listener: Listener) -> None:
    """Run a request to its end, passing its events to `listener` in order. Raises InputError for what a person can mend."""
    if how.mode == "in_process":
        run_stage(request, listener)
        return
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json(indent=1))
    events = request.folder / "events.jsonl"
    start = events.stat().st_size if events.is_file() else 0
    log = request.folder / "stderr.log"
    with log.open("w") as stderr:
        child = subprocess.Popen(
            command(file, how, STAGES[request.stage].distributed), stdout=stderr, stderr=stderr, preexec_fn=die_with_parent
        )
        try:
            for event in follow(events, start, child):
                listener(event)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode != 0:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        # torchrun and accelerate end with 1 whatever their ranks ended with, and write their own report behind.
        if said and (child.returncode == 2 or how.processes > 1 or how.accelerate_config is not None):
            raise InputError(said[-1])
        tail = "\n".join(lines[-20:])
        raise RuntimeError(f"the child process of {request.stage} ended with {child.returncode}; its last lines:\n{tail}")


def command(request: Path, how: Launch, distributed: bool = True) -> list[str]:
    """The command line of a child; a stage that is not distributed gets one process."""
    if not distributed:
        return [sys.executable, "-m", "stages", str(request)]
    if how.accelerate_config is not None:
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            how.accelerate_config,
            "-m",
            "stages",
            str(request),
        ]
    if how.processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(how.processes)]
        return [*torchrun, "-m", "stages", str(request)]
    return [sys.executable, "-m", "stages", str(request)]


def follow(path: Path, offset: int, child: subprocess.Popen[bytes]) -> Iterator[Event]:
    """The complete lines that are appended to an event file from `offset` on, until the child has ended."""
    rest = b""
    while True:
        ended = child.poll() is not None
        if path.is_file():
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            offset += len(data)
            *lines, rest = (rest + data).split(b"\n")
            yield from (json.loads(line) for line in lines)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def die_with_parent() -> None:
    """For a child, between fork and exec: be killed when the parent dies, however it dies (Linux; elsewhere no effect)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
