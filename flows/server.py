"""The servers over the local state: how they are started, and how long one waits for them.

Prefect would start its API by itself, but leaves it running when the command is killed, and starts it only at the first flow.
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from flows.children import spawn
from stages.errors import InputError

STARTUP_SECONDS = 120
HOST = "127.0.0.1"
PREFECT = ("--factory", "flows.prefect_api:create_app", "--lifespan", "on")
MLFLOW = ("mlflow.server.fastapi_app:app",)
DATABASE = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


def uvicorn(application: tuple[str, ...], host: str, port: int) -> list[str]:
    """A server's command. One process: a worker of it would outlive it."""
    return [sys.executable, "-m", "uvicorn", *application, "--host", host, "--port", str(port), "--log-level", "error"]


def prefect_settings(root: Path, address: str) -> dict[str, str]:
    """The environment of a Prefect server with its page.

    Where its database is, and the password to it, moves there from this process's: workers and steps have no use for it.
    """
    database = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(DATABASE)}
    return database | {
        # The page calls the address that it is told, else that of port 4200.
        "PREFECT_API_URL": f"{address}/api",
        # The page is copied to a place that can surely be written.
        "PREFECT_UI_STATIC_DIRECTORY": str(root / "prefect" / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # Leases live as long as the database that counts them: those in memory would be taken for ever by a restart.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def mlflow_settings(root: Path) -> dict[str, str]:
    """The environment of an MLflow server that passes artifacts on. `mlflow server` would set these and start uvicorn, but as a
    child that stays when the command is killed."""
    database = f"sqlite:///{root / 'mlflow.db'}"
    return {
        "_MLFLOW_SERVER_FILE_STORE": database,
        "_MLFLOW_SERVER_REGISTRY_STORE": database,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": (root / "artifacts").as_uri(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": database,
    }


def refuse_taken(host: str, port: int, option: str) -> None:
    """Raise InputError when a port cannot be had."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host}: no address of this machine ({error.strerror})") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(f"--host {host}: no address of this machine ({error.strerror})") from error
            raise InputError(
                f"port {port} is taken ({error.strerror}): perhaps by another `posttrain up`; stop it or give a free port "
                f"with {option}"
            ) from error


def wait_until_answered(address: str, log: Path | None, child: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for an address. Raises RuntimeError, with the server's log, when it does not answer in time or has ended."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and (child is None or child.poll() is None):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    what = f"did not answer within {STARTUP_SECONDS} s" if child is None or child.poll() is None else "ended"
    raise RuntimeError(f"the server of {address} {what}" + (f"; {log_end(log)}" if log else ""))


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
    log = _prefect_log(root)
    log.unlink(missing_ok=True)
    # Types of blocks are for people on its page: without them it starts two seconds earlier.
    plain = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_BLOCKS_REGISTER_ON_START": "0",
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "0",
    }
    child = spawn(uvicorn(PREFECT, HOST, port), plain, log)
    os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"

    def stop() -> None:
        child.terminate()
        child.wait()

    atexit.register(stop)


def wait_until_ready(root: Path) -> None:
    """Wait for the server named by PREFECT_API_URL."""
    wait_until_answered(f"{os.environ['PREFECT_API_URL']}/health", _prefect_log(root))


def _prefect_log(root: Path) -> Path:
    return root / "prefect" / "server.log"
