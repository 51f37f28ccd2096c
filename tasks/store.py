"""Artifacts in MLflow: find by key, publish, verify, locate.

A step's MLflow run carries the tags

    posttrain.key        what it computes          posttrain.stage, .step, .recipe, .pipeline
    posttrain.outputs    the handles it made: set last, by one call; without it the run does not count

Datasets are folders of the run's artifacts, models are logged models; both are registered, so that MLflow numbers their
versions. Publishing moves a folder into place and copies nothing. Manifests lie beside the outputs, as `manifests/NAME.json`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput, Param, Run, RunStatus, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_MODEL_VERSIONS

from stages.artifacts import Dataset, Kind, Manifest, Model, check, handle, read_manifest
from stages.data.parquet import count_rows, read_schema
from stages.errors import InputError
from tasks.provenance import provenance

OUTPUTS, PIPELINE = "posttrain.outputs", "posttrain.pipeline"
MODEL_ID = "posttrain.model."
OURS = "posttrain.experiment"


@dataclass(frozen=True)
class Published:
    """A complete run: its id, the pipeline that ran it, what it made, its last metrics."""

    run_id: str
    pipeline: str
    outputs: dict[str, Dataset | Model]
    metrics: dict[str, float]


class Store:
    """MLflow over SQLite under the state folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        uri = f"sqlite:///{root / 'mlflow.db'}"
        # MLflow's registry makes clients of its own, which know only the global addresses.
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # First use from several processes at once can corrupt the database.
        with (root / "mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.client.search_experiments(max_results=1)
            with sqlite3.connect(root / "mlflow.db") as database:
                database.execute("PRAGMA journal_mode=WAL")

    # Runs

    def experiment(self, name: str) -> str:
        """The id of a recipe's experiment, made on first use."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        with (self.root / "mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.client.get_experiment_by_name(name)
            location = (self.root / "artifacts" / name).as_uri()
            return found.experiment_id if found else self.client.create_experiment(name, location, tags={OURS: "1"})

    def runs(self, **tags: str) -> list[Run]:
        """Our runs with these tags (`key=...`, `step=...`), the newest first, in any recipe's experiment."""
        experiments = self.client.search_experiments(filter_string=f"tags.`{OURS}` = '1'")
        if not experiments:
            return []
        condition = " and ".join(f"tags.`posttrain.{name}` = '{value}'" for name, value in tags.items())
        ids = [experiment.experiment_id for experiment in experiments]
        return list(self.client.search_runs(ids, condition, order_by=["attributes.start_time DESC"], max_results=1000))

    def find(self, key: str, full: bool = False) -> tuple[Published | None, str | None]:
        """The complete run of a key whose artifacts are whole, and otherwise why there is none (None: never computed)."""
        reason = None
        for run in self.runs(key=key):
            if OUTPUTS not in run.data.tags:
                continue
            complete = published(run)
            problems = [text for name, made in complete.outputs.items() for text in self.problems(made, run, name, full)]
            if not problems:
                return complete, None
            reason = f"its artifacts are damaged: {problems[0]}"
        return None, reason

    def unfinished(self, **tags: str) -> Run | None:
        """The newest run with these tags (`key=...`) that was begun and is not complete."""
        return next((run for run in self.runs(**tags) if OUTPUTS not in run.data.tags), None)

    def begin(self, experiment: str, name: str, tags: Mapping[str, str], identity: dict[str, Any]) -> str:
        """Start a run and record its identity: as parameters for people, as a file for comparing."""
        ours = {f"posttrain.{tag}": value for tag, value in tags.items()}
        run = self.client.create_run(self.experiment(experiment), run_name=name, tags=provenance() | ours)
        run_id = run.info.run_id
        self.client.log_dict(run_id, identity, "identity.json")
        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(identity["config"])]
        self.client.log_batch(run_id, params=flat)
        return run_id

    def reopen(self, run_id: str) -> None:
        """Mark an unfinished run as running again."""
        self.client.update_run(run_id, status="RUNNING")

    def fail(self, run_id: str) -> None:
        """Mark a run as failed."""
        self.client.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))

    def identity(self, run: Run) -> dict[str, Any] | None:
        """The identity that a run recorded, or None when it did not get so far."""
        path = _local(run.info.artifact_uri) / "identity.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def inputs(self, run: Run) -> dict[str, Dataset | Model] | None:
        """What a run was made from, by port, or None when it did not record it."""
        path = _local(run.info.artifact_uri) / "inputs.json"
        return _handles(json.loads(path.read_text())) if path.is_file() else None

    # Publishing

    def publish(
        self,
        run_id: str,
        folder: Path,
        made: Mapping[str, Kind],
        names: Mapping[str, str],
        inputs: Mapping[str, Dataset | Model],
    ) -> dict[str, Dataset | Model]:
        """Move a finished stage's outputs into the store, register them, and set the complete tag, in this order.

        May be called again after a crash at any point: what was moved is adopted, what was registered is found.
        """
        outputs: dict[str, Dataset | Model] = {}
        for output, kind in made.items():
            place = self._place(run_id, output, kind, names[output])
            manifest = self._settle(run_id, output, kind, folder / "outputs" / output, place)
            version = self._register(run_id, names[output], output, kind, manifest.digest)
            uri = f"runs:/{run_id}/{output}" if kind == "dataset" else f"models:/{self._model_id(run_id, output)}"
            outputs[output] = handle(kind, name=names[output], version=str(version.version), digest=manifest.digest, uri=uri)
        self._link(run_id, inputs, outputs.values())
        self.client.log_dict(run_id, {name: given.model_dump() for name, given in inputs.items()}, "inputs.json")
        text = json.dumps({name: made.model_dump() for name, made in outputs.items()})
        self.client.log_batch(run_id, tags=[RunTag(OUTPUTS, text)])
        self.client.set_terminated(run_id)
        return outputs

    def _link(self, run_id: str, inputs: Mapping[str, Dataset | Model], outputs: Iterable[Dataset | Model]) -> None:
        """Record what went in and which models came out, for MLflow's pages; what a killed try recorded is left as it is."""
        run = self.client.get_run(run_id)
        known_in = {entry.model_id for entry in run.inputs.model_inputs} if run.inputs else set()
        known_out = {entry.model_id for entry in run.outputs.model_outputs} if run.outputs else set()
        ids_in = {given.uri.removeprefix("models:/") for given in inputs.values() if isinstance(given, Model)} - known_in
        ids_out = {made.uri.removeprefix("models:/") for made in outputs if isinstance(made, Model)} - known_out
        datasets = [_dataset_input(port, given) for port, given in inputs.items() if isinstance(given, Dataset)]
        if ids_in or datasets:
            self.client.log_inputs(run_id, datasets, [LoggedModelInput(model_id) for model_id in sorted(ids_in)])
        if ids_out:
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0) for model_id in sorted(ids_out)])

    def _place(self, run_id: str, output: str, kind: Kind, name: str) -> Path:
        if kind == "dataset":
            return _local(self.client.get_run(run_id).info.artifact_uri) / output
        model_id = self._model_id(run_id, output)
        if model_id is None:
            run = self.client.get_run(run_id)
            model = self.client.create_logged_model(run.info.experiment_id, name, run_id, params=run.data.params)
            model_id = model.model_id
            self.client.set_tag(run_id, MODEL_ID + output, model_id)
        return _local(self.client.get_logged_model(model_id).artifact_location)

    def _model_id(self, run_id: str, output: str) -> str | None:
        return self.client.get_run(run_id).data.tags.get(MODEL_ID + output)

    def _settle(self, run_id: str, output: str, kind: Kind, source: Path, place: Path) -> Manifest:
        """Move an output into its place, once; return its manifest."""
        manifests = _local(self.client.get_run(run_id).info.artifact_uri) / "manifests"
        manifests.mkdir(parents=True, exist_ok=True)
        record = manifests / f"{output}.json"
        if source.is_dir():
            manifest = _described(read_manifest(source, kind), source)
            draft = record.with_suffix(".draft")
            draft.write_text(manifest.model_dump_json(indent=1))
            draft.replace(record)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, place)
        manifest = Manifest.model_validate_json(record.read_text())
        if problems := check(place, manifest):
            raise InputError(f"{place}: damaged while it was published: {problems[0]}; run the step again with --from")
        return manifest

    def _register(self, run_id: str, name: str, output: str, kind: Kind, digest: str) -> ModelVersion:
        """The registered version of a run's output, made once."""
        existing = [v for v in self.client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
        version = existing[0] if existing else self._new_version(run_id, name, output, kind, digest)
        if model_id := self._model_id(run_id, output):
            # Without it the model's own page says that it is not registered.
            versions = json.dumps([{"name": name, "version": str(version.version)}])
            self.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: versions})
        return version

    def _new_version(self, run_id: str, name: str, output: str, kind: Kind, digest: str) -> ModelVersion:
        try:
            self.client.create_registered_model(name, tags={"kind": kind})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model_id = self._model_id(run_id, output) if kind == "model" else None
        if model_id is not None:
            self.client.finalize_logged_model(model_id, "READY")
        source = f"models:/{model_id}" if model_id else f"runs:/{run_id}/{output}"
        return self.client.create_model_version(name, source, run_id, tags={"kind": kind, "digest": digest}, model_id=model_id)

    # Reading

    def locate(self, given: Dataset | Model) -> Path:
        """The local folder of an artifact."""
        if given.uri.startswith("runs:/"):
            run_id, _, path = given.uri.removeprefix("runs:/").partition("/")
            return _local(self.client.get_run(run_id).info.artifact_uri) / path
        return _local(self.client.get_logged_model(given.uri.removeprefix("models:/")).artifact_location)

    def manifest(self, run: Run, output: str) -> Manifest:
        """What a run published as an output."""
        path = _local(run.info.artifact_uri) / "manifests" / f"{output}.json"
        if not path.is_file():
            raise InputError(f"run {run.info.run_id}: its manifest of {output} is gone; run the step again with --from")
        return Manifest.model_validate_json(path.read_text())

    def problems(self, made: Dataset | Model, run: Run, output: str, full: bool = False) -> list[str]:
        """What is wrong with a published artifact, in words."""
        try:
            return [f"{made}: {text}" for text in check(self.locate(made), self.manifest(run, output), full)]
        except InputError as error:
            return [str(error)]


def _dataset_input(port: str, given: Dataset) -> DatasetInput:
    source = json.dumps({"uri": given.uri})
    # MLflow takes no digest as long as ours.
    shown = MlflowDataset(name=str(given), digest=given.digest[:12], source_type="local", source=source)
    return DatasetInput(shown, [InputTag(MLFLOW_DATASET_CONTEXT, port)])


def _described(manifest: Manifest, folder: Path) -> Manifest:
    if manifest.kind == "model":
        return manifest
    if not any(entry.path.endswith(".parquet") for entry in manifest.files):
        return manifest
    columns = {field.name: str(field.type) for field in read_schema(folder)}
    return manifest.model_copy(update={"rows": count_rows(folder), "columns": columns})


def published(run: Run) -> Published:
    """What a complete run made."""
    outputs = _handles(json.loads(run.data.tags[OUTPUTS]))
    return Published(run.info.run_id, run.data.tags.get(PIPELINE, ""), outputs, dict(run.data.metrics))


def _handles(described: dict[str, dict[str, Any]]) -> dict[str, Dataset | Model]:
    return {name: handle(fields.pop("kind"), **fields) for name, fields in described.items()}


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, item in value.items():
        flat += _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return flat


def _local(uri: str | None) -> Path:
    parsed = urlparse(uri or "")
    if parsed.scheme not in ("", "file"):
        raise InputError(f"{uri}: only a local artifact store can be used from here")
    return Path(unquote(parsed.path))
