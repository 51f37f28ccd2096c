"""`posttrain ui`: Prefect's and MLflow's pages over the local state.

Runs need neither: each starts a Prefect API of its own over the same database, so that pages can come and go while steps run.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.server import HOST, PREFECT, log_end, serve, stop, wait_until_answered
from stages.errors import InputError

MLFLOW = ("mlflow.server.fastapi_app:app",)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Page:
    """A server with a page."""

    address: str
    log: Path
    child: subprocess.Popen[bytes]


@contextmanager
def pages(root: Path, prefect_port: int, mlflow_port: int) -> Iterator[tuple[Page, Page]]:
    """Prefect's and MLflow's pages, which answer within the block and are gone after it. InputError when a port is taken."""
    _refuse_taken(prefect_port, "--prefect-port")
    _refuse_taken(mlflow_port, "--mlflow-port")
    with ExitStack() as stack:

        def start(application: tuple[str, ...], port: int, log: Path, settings: dict[str, str]) -> Page:
            child = serve(application, port, log, settings)
            stack.callback(stop, child)
            return Page(f"http://{HOST}:{port}", log, child)

        prefect = start(PREFECT, prefect_port, root / "prefect" / "ui.log", _prefect_settings(root, prefect_port))
        mlflow = start(MLFLOW, mlflow_port, root / "mlflow.log", _mlflow_settings(root))
        wait_until_answered(f"{prefect.address}/api/health", prefect.log, prefect.child)
        wait_until_answered(f"{mlflow.address}/health", mlflow.log, mlflow.child)
        yield prefect, mlflow


def wait_for_ctrl_c(served: tuple[Page, ...]) -> None:
    """Return when a person has had enough. Raises RuntimeError when a server ends by itself."""
    try:
        while all(page.child.poll() is None for page in served):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return
    ended = next(page for page in served if page.child.poll() is not None)
    raise RuntimeError(f"the server of {ended.address} ended; {log_end(ended.log)}")


def _prefect_settings(root: Path, port: int) -> dict[str, str]:
    # The page calls the address that it is told, else that of port 4200. It is copied to a place that can surely be written.
    return {
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_UI_STATIC_DIRECTORY": str(root / "prefect" / "ui"),
    }


def _mlflow_settings(root: Path) -> dict[str, str]:
    # `mlflow server` would set these and start uvicorn, but as a child that stays when the command is killed.
    database = f"sqlite:///{root / 'mlflow.db'}"
    return {
        "_MLFLOW_SERVER_FILE_STORE": database,
        "_MLFLOW_SERVER_REGISTRY_STORE": database,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": (root / "artifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _refuse_taken(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} is taken ({error.strerror}): perhaps by another `posttrain ui`; stop it or give a free port "
                f"with {option}"
            ) from error
