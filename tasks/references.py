"""References, the way a person names an artifact, to handles.

    models    org/name[@revision]   ./folder   ./file.gguf   models:/NAME/VERSION   models:/NAME@ALIAS   init:FILE
    datasets  org/name[@revision]   ./path.jsonl or a glob   datasets:/NAME/VERSION   datasets:/NAME@ALIAS   procedural:NAME

What comes from outside is copied into the store once (by content) and registered as `source-...`, so that a pipeline keeps
what it was trained on and its inputs have digests.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from stages.artifacts import Dataset, Kind, Model, digest_of, handle, read_manifest
from stages.data.procedural import procedural
from stages.data.sources import PROCEDURAL_FILE
from stages.errors import InputError
from tasks.entries import OUTPUTS, published
from tasks.lease import lease
from tasks.store import Store

REGISTERED = re.compile(r"(models|datasets):/([^/@]+)(?:/(\d+)|@([\w.-]+))")
HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
INIT_FILE = "init.yaml"


def expand(reference: str) -> str:
    """`${VAR}` from the environment. Raises InputError for one that is not set."""

    def value(match: re.Match[str]) -> str:
        if match.group(1) not in os.environ:
            raise InputError(f"{reference}: the environment variable {match.group(1)} is not set")
        return os.environ[match.group(1)]

    return re.sub(r"\$\{(\w+)\}", value, reference)


def resolve(store: Store, reference: str, kind: Kind, publish: bool = True) -> Dataset | Model:
    """The handle of a reference. Raises InputError saying what does not exist, with near names where there are some.

    With `publish=False` (a dry run) nothing is written: what is not in the store yet gets a handle with a digest alone.
    """
    text = expand(reference)
    if registered := REGISTERED.fullmatch(text):
        return _registered(store, text, registered, kind)
    if text.startswith(("models:", "datasets:")):
        raise InputError(f"{text}: a registered artifact is written {kind}s:/NAME/VERSION or {kind}s:/NAME@ALIAS")
    name = re.sub(r"\W+", "-", text).strip("-")
    draft = store.root / "runs" / f"ingest-{os.getpid()}-{digest_of(text)[:12]}"
    shutil.rmtree(draft, ignore_errors=True)
    folder = draft / "outputs" / "files"
    folder.mkdir(parents=True)
    try:
        _fetch(text, kind, folder)
        return _ingest(store, text, kind, f"source-{name}", draft, publish)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def ingest(store: Store, files: Sequence[Path], kind: Kind, name: str) -> Dataset | Model:
    """The handle of files under a name that is given. Raises InputError for one that does not exist."""
    draft = store.root / "runs" / f"ingest-{os.getpid()}-{digest_of([name, *map(str, files)])[:12]}"
    folder = draft / "outputs" / "files"
    shutil.rmtree(draft, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for number, file in enumerate(sorted(files), start=1):
            # Two browsers give their files one name.
            shutil.copyfile(_existing(str(file)), folder / f"{number:03d}-{file.name}")
        return _ingest(store, ", ".join(file.name for file in files), kind, name, draft, publish=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fetch(text: str, kind: Kind, folder: Path) -> None:
    """Copy what a reference from outside names into a folder."""
    if kind == "dataset" and text.startswith("procedural:"):
        name = text.removeprefix("procedural:")
        try:
            source = procedural(name)
        except KeyError as error:
            raise InputError(f"{text}: no procedural source has this name{_near(name, error.args[0])}") from error
        (folder / PROCEDURAL_FILE).write_text(json.dumps({"name": name, "version": source.version}))
    elif kind == "model" and text.startswith("init:"):
        shutil.copyfile(_existing(text.removeprefix("init:")), folder / INIT_FILE)
    elif text.startswith((".", "/", "~")) or Path(text).exists() or (any(c in text for c in "*?[") and kind == "dataset"):
        _copy(text, kind, folder)
    elif HUB.fullmatch(text):
        _download(text, kind, folder)
    else:
        raise InputError(f"{text}: not a reference to a {kind}; see the README for the ways to write one")


def _copy(text: str, kind: Kind, folder: Path) -> None:
    path = Path(text).expanduser()
    if path.is_dir():
        shutil.copytree(path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
        return
    found = _matching(text, path) if kind == "dataset" and any(c in text for c in "*?[") and not path.exists() else []
    files = found or [_existing(text)]
    # Files of several folders may have one name: they keep the folders that they do not share.
    above = os.path.commonpath([file.parent for file in files])
    for file in files:
        copy = folder / file.relative_to(above)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _matching(text: str, pattern: Path) -> list[Path]:
    """The files that a glob names. Raises InputError when there are none."""
    anchor = Path(pattern.anchor)
    try:
        found = sorted(file for file in anchor.glob(str(pattern.relative_to(anchor))) if not file.is_dir())
    except ValueError as error:
        raise InputError(f"{text}: no pattern of files: {error}") from error
    if not found:
        raise InputError(f"{text}: no file matches this pattern; a relative one is sought from {Path.cwd()}")
    return [_existing(str(file)) for file in found]


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.exists():
        siblings = [entry.name for entry in path.parent.glob("[!.]*")]
        raise InputError(f"{text}: no such file{_near(path.name, siblings)}")
    return path


def _download(text: str, kind: Kind, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    only_weights = ["*.bin", "*.pth", "*.msgpack", "*.h5", "*.onnx", "original/*"] if kind == "model" else None
    try:
        snapshot_download(name, repo_type=kind, revision=revision or None, local_dir=folder, ignore_patterns=only_weights)
    except Exception as error:
        raise InputError(
            f"{text}: could not be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "a local file or folder is written ./path"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _ingest(store: Store, text: str, kind: Kind, name: str, draft: Path, publish: bool) -> Dataset | Model:
    digest = read_manifest(draft / "outputs" / "files", kind).digest
    key = digest_of(["ingest", kind, digest, name])
    with lease(store.root / "leases", key):
        complete, _ = store.find(key)
        if complete is not None:
            return complete.outputs["files"]
        if not publish:
            return handle(kind, name=name, version="", digest=digest, uri="")
        identity = {"stage": "ingest", "version": 1, "config": {"reference": text}, "inputs": {"files": digest}}
        run_id = store.begin("sources", text, {"key": key, "stage": "ingest", "step": name, "recipe": "sources"}, identity)
        return store.publish(run_id, draft, {"files": kind}, {"files": name}, {})["files"]


def registered_version(store: Store, text: str, match: re.Match[str], kind: Kind) -> ModelVersion:
    """The registered version that a reference names. Raises InputError with near names, or the versions that there are."""
    scheme, name, version, alias = match.groups()
    if scheme != f"{kind}s":
        raise InputError(f"{text}: a {kind} is needed here, not one of the {scheme}")
    try:
        found = (
            store.client.get_model_version(name, version) if version else store.client.get_model_version_by_alias(name, alias)
        )
    except MlflowException as error:
        names = [model.name for model in store.client.search_registered_models() if model.tags.get("kind") == kind]
        versions = [v.version for v in store.client.search_model_versions(f"name = '{name}'")] if name in names else []
        hint = f"; it has the versions {', '.join(map(str, versions))}" if versions else _near(name, names)
        raise InputError(f"{text}: no such {kind}{hint}") from error
    if (registered := found.tags.get("kind", kind)) != kind:
        raise InputError(f"{text}: {name} is a {registered}, not a {kind}; write {registered}s:/{name}/{found.version}")
    return found


def _registered(store: Store, text: str, match: re.Match[str], kind: Kind) -> Dataset | Model:
    found = registered_version(store, text, match, kind)
    try:
        run = store.client.get_run(str(found.run_id))
    except MlflowException as error:
        raise InputError(f"{text}: its run {found.run_id} is gone, so it cannot be built on; make it again") from error
    outputs = published(run).outputs.values() if OUTPUTS in run.data.tags else []
    for made in outputs:
        # By its address: a champion is registered under a second name.
        if made.uri == found.source and made.kind == kind:
            return made.model_copy(update={"name": found.name, "version": str(found.version)})
    raise InputError(f"{text}: its run {found.run_id} never completed, so it is not an artifact to build on")


def _near(name: str, names: object) -> str:
    known = [str(other) for other in names]  # pyright: ignore[reportGeneralTypeIssues]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; near: {', '.join(close)}" if close else f"; there are {', '.join(sorted(known)[:8])}" if known else ""
