"""Where state lives, which servers keep it, and the environment that their libraries must see before they are imported."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from tasks.credentials import check, credentials

DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # With the library's defaults a server that is down blocks each call for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Deterministic matrix products on CUDA (contract 16).
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# MLflow's server takes half a minute to start again: a command waits for it for two minutes in all.
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "6", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "2"}
# A flow run had better wait for servers than die: eight minutes.
PATIENT_RUNS = {**PATIENT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "10", "PREFECT_CLIENT_MAX_RETRIES": "8"}

# A flow run with this tag tells that it lives, and is taken for crashed when it is silent.
OURS_TAG = "posttrain"


def home() -> Path:
    """The state folder: $POSTTRAIN_HOME, by default `.posttrain` in the working directory."""
    return Path(os.environ.get("POSTTRAIN_HOME", ".posttrain")).absolute()


def server() -> str | None:
    """The address of the MLflow server that keeps runs and artifacts; None for the files under the state folder."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return address if address.startswith(("http://", "https://")) else None


def configure_environment() -> Path:
    """Create the state folder and set what Prefect, MLflow and torch read from the environment; what is set already stays.

    When `posttrain up` runs over this state, its servers are used. Raises InputError when servers do not let us in.
    """
    root = home()
    for name in ("artifacts", "runs", "leases", "prefect", "cache"):
        (root / name).mkdir(parents=True, exist_ok=True)
    known = credentials()
    if known is not None:
        os.environ |= known.for_clients()
    found = None if server() or os.environ.get("PREFECT_API_URL") else is_up(root)
    if found is not None:
        use_servers(found["prefect"], found["mlflow"], found["artifacts"])
    places = {
        "POSTTRAIN_HOME": str(root),
        "PREFECT_HOME": str(root / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
    }
    for name, value in {**DEFAULTS, **(PATIENT if server() else {}), **places}.items():
        os.environ.setdefault(name, value)
    check(os.environ.get("PREFECT_API_URL"), server())
    return root


def use_servers(prefect: str, mlflow: str, artifacts: str | None) -> None:
    """Have this process and its children use these servers; `artifacts` is where their files lie, when on this machine."""
    os.environ |= {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow, **PATIENT}
    os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"
    if artifacts is not None:
        os.environ["POSTTRAIN_ARTIFACTS"] = artifacts


def is_up(root: Path) -> dict[str, Any] | None:
    """Process and addresses of the `posttrain up` that runs over a state folder."""
    lock, record = root / "up.lock", root / "up.json"
    if not lock.is_file() or not record.is_file():
        return None
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                return json.loads(record.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                # It is just starting or ending.
                return None
    return None
