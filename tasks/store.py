"""Artifacts in MLflow: find by key, publish, verify, locate.

A step's MLflow run carries the tags

    posttrain.key        what it computes          posttrain.stage, .step, .recipe, .pipeline
    posttrain.outputs    the handles it made: set last, by one call; without it the run does not count

Datasets are folders of the run's artifacts, models are logged models; both are registered, so that MLflow numbers their
versions. Manifests lie beside the outputs, as `manifests/NAME.json`.

MLflow is a SQLite file and a folder under the state folder, unless MLFLOW_TRACKING_URI is the address of a server. Where the
server's files lie on this machine, $POSTTRAIN_ARTIFACTS says so. Publishing then moves a folder into place and copies nothing;
elsewhere files go and come through the server.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, LoggedModelOutput, Param, Run, RunStatus, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from stages.artifacts import Dataset, Kind, Manifest, Model, handle, read_manifest
from stages.errors import InputError
from tasks.entries import (
    MODEL_ID,
    OURS,
    OUTPUTS,
    Published,
    dataset_input,
    described,
    flatten,
    handles,
    published,
)
from tasks.files import SCHEME, Files, Folder, Served
from tasks.home import server
from tasks.provenance import provenance


class Store:
    """MLflow over SQLite under the state folder, or behind a server."""

    def __init__(self, root: Path) -> None:
        self.root, address = root, server()
        uri = address or f"sqlite:///{root / 'mlflow.db'}"
        # MLflow's registry makes clients of its own, which know only the global addresses.
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # First use from several processes at once can corrupt the database.
        with (root / "mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.client.search_experiments(max_results=1)
            if address is None:
                with sqlite3.connect(root / "mlflow.db") as database:
                    database.execute("PRAGMA journal_mode=WAL")
        here = os.environ.get("POSTTRAIN_ARTIFACTS") if address else str(root / "artifacts")
        self.files: Files = Folder(Path(here)) if here else Served(root / "cache", uri)

    # Runs

    def experiment(self, name: str) -> str:
        """The id of a recipe's experiment, made on first use."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(name, f"{SCHEME}:/{name}", tags={OURS: "1"})
        except MlflowException:
            # Another process was faster.
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def runs(self, **tags: str) -> list[Run]:
        """Our runs with these tags (`key=...`, `step=...`), the newest first, in any recipe's experiment."""
        experiments = self.client.search_experiments(filter_string=f"tags.`{OURS}` = '1'")
        if not experiments:
            return []
        condition = " and ".join(f"tags.`posttrain.{name}` = '{value}'" for name, value in tags.items())
        ids = [experiment.experiment_id for experiment in experiments]
        return list(self.client.search_runs(ids, condition, order_by=["attributes.start_time DESC"], max_results=1000))

    def is_complete(self, run_id: str) -> bool:
        """Whether a run has published its outputs."""
        return OUTPUTS in self.client.get_run(run_id).data.tags

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
        self.write(run_id, "identity.json", identity)
        flat = [Param(key, str(value)[:6000]) for key, value in flatten(identity["config"])]
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
        content = self.files.read(_address(run), "identity.json")
        return json.loads(content) if content else None

    def inputs(self, run: Run) -> dict[str, Dataset | Model] | None:
        """What a run was made from, by port, or None when it did not record it."""
        content = self.files.read(_address(run), "inputs.json")
        return handles(json.loads(content)) if content else None

    def write(self, run_id: str, path: str, content: Any) -> None:
        """Put a small file among a run's artifacts: bytes, or a value as JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=2).encode()
        self.files.write(_address(self.client.get_run(run_id)), path, content)

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
        run = self.client.get_run(run_id)
        for output, kind in made.items():
            place = self._place(run, output, kind, names[output])
            manifest = self._settle(run, output, kind, folder / "outputs" / output, place)
            version = self._register(run_id, names[output], output, kind, manifest.digest)
            uri = f"runs:/{run_id}/{output}" if kind == "dataset" else f"models:/{self._model_id(run_id, output)}"
            outputs[output] = handle(kind, name=names[output], version=str(version.version), digest=manifest.digest, uri=uri)
        self._link(run_id, inputs, outputs.values())
        self.write(run_id, "inputs.json", {name: given.model_dump() for name, given in inputs.items()})
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
        datasets = [dataset_input(port, given) for port, given in inputs.items() if isinstance(given, Dataset)]
        if ids_in or datasets:
            self.client.log_inputs(run_id, datasets, [LoggedModelInput(model_id) for model_id in sorted(ids_in)])
        if ids_out:
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0) for model_id in sorted(ids_out)])

    def _place(self, run: Run, output: str, kind: Kind, name: str) -> str:
        """The address that an output gets."""
        if kind == "dataset":
            return f"{_address(run)}/{output}"
        model_id = self._model_id(run.info.run_id, output)
        if model_id is None:
            model = self.client.create_logged_model(run.info.experiment_id, name, run.info.run_id, params=run.data.params)
            model_id = model.model_id
            self.client.set_tag(run.info.run_id, MODEL_ID + output, model_id)
        return str(self.client.get_logged_model(model_id).artifact_location)

    def _model_id(self, run_id: str, output: str) -> str | None:
        return self.client.get_run(run_id).data.tags.get(MODEL_ID + output)

    def _settle(self, run: Run, output: str, kind: Kind, source: Path, place: str) -> Manifest:
        """Give an output its place, once; return its manifest."""
        if source.is_dir():
            manifest = described(read_manifest(source, kind), source)
            self.files.write(_address(run), f"manifests/{output}.json", manifest.model_dump_json(indent=1).encode())
            self.files.settle(source, place)
        manifest = self.manifest(run, output)
        if problems := self.files.problems(place, manifest):
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
        """A local folder with an artifact's files. Raises InputError when its files cannot be found as they were published."""
        run, output = self.maker(given)
        return self.files.locate(self._address_of(given, run), self.manifest(run, output))

    def maker(self, given: Dataset | Model) -> tuple[Run, str]:
        """The run that made an artifact, and the name of this output of it."""
        if given.uri.startswith("runs:/"):
            run_id, _, output = given.uri.removeprefix("runs:/").partition("/")
            return self.client.get_run(run_id), output
        model_id = given.uri.removeprefix("models:/")
        run = self.client.get_run(str(self.client.get_logged_model(model_id).source_run_id))
        output = next(name for name, found in run.data.tags.items() if name.startswith(MODEL_ID) and found == model_id)
        return run, output.removeprefix(MODEL_ID)

    def _address_of(self, given: Dataset | Model, run: Run) -> str:
        if given.uri.startswith("runs:/"):
            return f"{_address(run)}/{given.uri.removeprefix('runs:/').partition('/')[2]}"
        return str(self.client.get_logged_model(given.uri.removeprefix("models:/")).artifact_location)

    def manifest(self, run: Run, output: str) -> Manifest:
        """What a run published as an output."""
        content = self.files.read(_address(run), f"manifests/{output}.json")
        if content is None:
            raise InputError(f"run {run.info.run_id}: its manifest of {output} is gone; run the step again with --from")
        return Manifest.model_validate_json(content)

    def problems(self, made: Dataset | Model, run: Run, output: str, full: bool = False) -> list[str]:
        """What is wrong with a published artifact, in words."""
        try:
            address, manifest = self._address_of(made, run), self.manifest(run, output)
            return [f"{made}: {text}" for text in self.files.problems(address, manifest, full)]
        except InputError as error:
            return [str(error)]


def _address(run: Run) -> str:
    return str(run.info.artifact_uri)
