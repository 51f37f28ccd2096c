"""How runs and artifacts are written down in MLflow: the tags of a run, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from stages.artifacts import Dataset, Manifest, Model, handle
from stages.data.parquet import count_rows, read_schema

OUTPUTS, PIPELINE = "posttrain.outputs", "posttrain.pipeline"
STATUS = "posttrain.status"
MODEL_ID = "posttrain.model."
OURS = "posttrain.experiment"

Status = Literal["ran", "resumed", "skipped"]


@dataclass(frozen=True)
class Published:
    """A complete run: its id, the pipeline that ran it, whether it was resumed, what it made, its last metrics."""

    run_id: str
    pipeline: str
    status: Status
    outputs: dict[str, Dataset | Model]
    metrics: dict[str, float]


def dataset_input(port: str, given: Dataset) -> DatasetInput:
    source = json.dumps({"uri": given.uri})
    # MLflow takes no digest as long as ours.
    shown = MlflowDataset(name=str(given), digest=given.digest[:12], source_type="local", source=source)
    return DatasetInput(shown, [InputTag(MLFLOW_DATASET_CONTEXT, port)])


def described(manifest: Manifest, folder: Path) -> Manifest:
    if manifest.kind == "model":
        return manifest
    if not any(entry.path.endswith(".parquet") for entry in manifest.files):
        return manifest
    columns = {field.name: str(field.type) for field in read_schema(folder)}
    return manifest.model_copy(update={"rows": count_rows(folder), "columns": columns})


def published(run: Run) -> Published:
    """What a complete run made."""
    outputs = handles(json.loads(run.data.tags[OUTPUTS]))
    tags = run.data.tags
    status: Status = "resumed" if tags.get(STATUS) == "resumed" else "ran"
    return Published(run.info.run_id, tags.get(PIPELINE, ""), status, outputs, dict(run.data.metrics))


def handles(described: dict[str, dict[str, Any]]) -> dict[str, Dataset | Model]:
    return {name: handle(fields.pop("kind"), **fields) for name, fields in described.items()}


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, item in value.items():
        flat += flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return flat
