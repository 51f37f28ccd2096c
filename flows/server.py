"""The Prefect API for one command: a server child over the local state, which dies with its parent however that dies.

Prefect would start the same by itself, but leaves it running when the command is killed, and starts it only at the first flow.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tasks.launch import die_with_parent

STARTUP_SECONDS = 120


def start_prefect_server(root: Path) -> None:
    """Serve the Prefect API on loopback until this process ends, unless PREFECT_API_URL names a server already.

    Call it before Prefect is imported: it is stopped at exit, after Prefect's own exit handlers have sent the last logs.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--factory",
        "prefect.server.api.server:create_app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--lifespan",
        "on",
    ]
    with (root / "prefect" / "server.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *arguments, "--log-level", "error"],
            env={**os.environ, "PREFECT_UI_ENABLED": "0"},
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
            # A terminal's ctrl-C goes to the whole group: the server must outlive it, to hear that the flow run was stopped.
            process_group=0,
        )
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    atexit.register(_stop, child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    child.wait()


def wait_until_ready(root: Path) -> None:
    """Wait for the server named by PREFECT_API_URL. Raises RuntimeError, with its log, when it does not answer in time."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    log = root / "prefect" / "server.log"
    tail = "\n".join(log.read_text().splitlines()[-20:]) if log.is_file() else "(no log)"
    raise RuntimeError(f"Prefect's server did not answer within {STARTUP_SECONDS} s; the end of {log}:\n{tail}")
