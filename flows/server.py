"""Servers over the local state, as children that die with this process however it dies.

Prefect would start its API by itself, but leaves it running when the command is killed, and starts it only at the first flow.
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
HOST = "127.0.0.1"
PREFECT = ("--factory", "prefect.server.api.server:create_app", "--lifespan", "on")


def serve(application: tuple[str, ...], port: int, log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start uvicorn on loopback with these settings in its environment. One process: a worker of it would outlive it."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *application, "--host", HOST, "--port", str(port), "--log-level", "error"],
            env={**os.environ, **settings},
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
            # A terminal's ctrl-C goes to the whole group: the server must outlive it, to hear that the flow run was stopped.
            process_group=0,
        )


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a server and wait for it."""
    child.terminate()
    child.wait()


def wait_until_answered(address: str, log: Path, child: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for an address. Raises RuntimeError, with the server's log, when it does not answer in time or has ended."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and (child is None or child.poll() is None):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    what = f"did not answer within {STARTUP_SECONDS} s" if child is None or child.poll() is None else "ended"
    raise RuntimeError(f"the server of {address} {what}; {log_end(log)}")


def log_end(log: Path) -> str:
    """The last lines of a server's log, for a message."""
    tail = "\n".join(log.read_text().splitlines()[-20:]) if log.is_file() else "(no log)"
    return f"the end of {log}:\n{tail}"


def start_prefect_server(root: Path) -> None:
    """Serve the Prefect API until this process ends, unless PREFECT_API_URL names a server already.

    Call it before Prefect is imported: it is stopped at exit, after Prefect's own exit handlers have sent the last logs.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    child = serve(PREFECT, port, _prefect_log(root), {"PREFECT_UI_ENABLED": "0"})
    os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    atexit.register(stop, child)


def wait_until_ready(root: Path) -> None:
    """Wait for the server named by PREFECT_API_URL."""
    wait_until_answered(f"{os.environ['PREFECT_API_URL']}/health", _prefect_log(root))


def _prefect_log(root: Path) -> Path:
    return root / "prefect" / "server.log"
