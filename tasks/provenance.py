"""Which code made an artifact: the commit and the versions that matter."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("posttrain", "torch", "transformers", "accelerate", "datasets", "pyarrow", "tokenizers", "numpy")


@functools.cache
def provenance() -> dict[str, str]:
    """Tags for an MLflow run: `mlflow.source.git.commit` (`-dirty` when files differ from it), `posttrain.version.*`."""
    tags = {f"posttrain.version.{name}": found for name in PACKAGES if (found := _version(name))}
    tags["posttrain.version.python"] = platform.python_version()
    # MLflow's page shows the commit of runs alone that have a source.
    tags |= {"mlflow.source.name": "posttrain", "mlflow.source.type": "LOCAL"}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit + ("-dirty" if _git("status", "--porcelain", "-uno") else "")
    return tags


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of the code's own checkout; nothing when it is installed outside of one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
