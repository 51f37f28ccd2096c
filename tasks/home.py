"""Where state lives, and the environment that the servers' libraries must see before they are imported."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # With the libraries' defaults a server that is down blocks each call for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Deterministic matrix products on CUDA (contract 16).
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def home() -> Path:
    """The state folder: $POSTTRAIN_HOME, by default `.posttrain` in the working directory."""
    return Path(os.environ.get("POSTTRAIN_HOME", ".posttrain")).absolute()


def configure_environment() -> Path:
    """Create the state folder and set what Prefect, MLflow and torch read from the environment; what is set already stays."""
    root = home()
    for name in ("artifacts", "runs", "leases", "prefect"):
        (root / name).mkdir(parents=True, exist_ok=True)
    places = {
        "POSTTRAIN_HOME": str(root),
        "PREFECT_HOME": str(root / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
    }
    for name, value in {**DEFAULTS, **places}.items():
        os.environ.setdefault(name, value)
    return root
