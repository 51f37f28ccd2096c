"""Where artifacts' files lie: in a folder of this machine, or behind the MLflow server that keeps them.

Either way a file has the address that MLflow knows, `mlflow-artifacts:/EXPERIMENT/RUN/artifacts` and a path in it, so that one
database serves both: the local default writes into the folder itself, a worker elsewhere through the server.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from requests import HTTPError

from stages.artifacts import Manifest, check, read_manifest
from stages.errors import InputError
from tasks.lease import lock

SCHEME = "mlflow-artifacts"


class Files(Protocol):
    """Files by address."""

    def read(self, address: str, path: str) -> bytes | None:
        """A small file's content, or None when there is none."""
        ...

    def write(self, address: str, path: str, content: bytes) -> None:
        """Write a small file; a reader sees the old one or the new one."""
        ...

    def settle(self, source: Path, address: str) -> None:
        """Give a folder its place, in the place of whatever is there; `source` is gone afterwards."""
        ...

    def share(self, source: Path, address: str) -> None:
        """Put a copy of a folder at an address that holds nothing yet."""
        ...

    def fetch(self, address: str, target: Path) -> None:
        """Copy a folder from its address to a folder that does not exist yet."""
        ...

    def remove(self, address: str) -> None:
        """Remove what is at an address, if anything is."""
        ...

    def locate(self, address: str, manifest: Manifest) -> Path:
        """A folder of this machine with an artifact's files. Raises InputError when they are not those of the manifest."""
        ...

    def problems(self, address: str, manifest: Manifest, full: bool = False) -> list[str]:
        """What is wrong with an artifact, in words; with `full` every byte of it is read."""
        ...


class Folder:
    """All artifacts below one folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, address: str) -> Path:
        """The folder of an address."""
        parsed = urlparse(address)
        if parsed.scheme == SCHEME:
            return self.root / unquote(parsed.path).lstrip("/")
        if parsed.scheme in ("", "file"):
            return Path(unquote(parsed.path))
        raise InputError(f"{address}: only a local artifact store can be used from here")

    def read(self, address: str, path: str) -> bytes | None:
        file = self.path(address) / path
        return file.read_bytes() if file.is_file() else None

    def write(self, address: str, path: str, content: bytes) -> None:
        file = self.path(address) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        draft.write_bytes(content)
        draft.replace(file)

    def settle(self, source: Path, address: str) -> None:
        place = self.path(address)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, place)

    def share(self, source: Path, address: str) -> None:
        copy_by_links(source, self.path(address))

    def fetch(self, address: str, target: Path) -> None:
        shutil.copytree(self.path(address), target)

    def remove(self, address: str) -> None:
        shutil.rmtree(self.path(address), ignore_errors=True)

    def locate(self, address: str, manifest: Manifest) -> Path:
        del manifest
        return self.path(address)

    def problems(self, address: str, manifest: Manifest, full: bool = False) -> list[str]:
        return check(self.path(address), manifest, full)


class Served:
    """All artifacts behind an MLflow server. What was read once stays in a cache, by digest."""

    def __init__(self, cache: Path, tracking_uri: str) -> None:
        self.cache, self.tracking_uri = cache, tracking_uri

    def read(self, address: str, path: str) -> bytes | None:
        draft = self._draft()
        draft.mkdir(parents=True)
        try:
            self._repository(address)._download_file(path, str(draft / "file"))
            return (draft / "file").read_bytes()
        except HTTPError as error:
            if error.response is not None and error.response.status_code == 404:
                return None
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def write(self, address: str, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        draft = self._draft()
        draft.mkdir(parents=True)
        try:
            (draft / name).write_bytes(content)
            self._repository(address).log_artifact(str(draft / name), folder or None)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def settle(self, source: Path, address: str) -> None:
        self.remove(address)
        self._repository(address).log_artifacts(str(source))
        self._keep(source, read_manifest(source, "dataset").digest)

    def share(self, source: Path, address: str) -> None:
        self._repository(address).log_artifacts(str(source))

    def fetch(self, address: str, target: Path) -> None:
        target.mkdir(parents=True)
        repository = self._repository(address)
        for path in _listing(repository):
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            repository._download_file(path, str(file))

    def remove(self, address: str) -> None:
        repository = self._repository(address)
        if repository.list_artifacts():
            repository.delete_artifacts()

    def locate(self, address: str, manifest: Manifest) -> Path:
        kept = self._kept(manifest.digest)
        if kept is not None:
            return kept
        draft = self._draft()
        try:
            self.fetch(address, draft)
            if read_manifest(draft, manifest.kind).digest != manifest.digest:
                raise InputError(f"{address}: its files are not those that were published; run its step again with --from")
            return self._keep(draft, manifest.digest)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def problems(self, address: str, manifest: Manifest, full: bool = False) -> list[str]:
        found = _listing(self._repository(address))
        known = {entry.path: entry.size for entry in manifest.files}
        problems = [f"{path} is missing" for path in known.keys() - found.keys()]
        problems += [
            f"{path} has {found[path]} bytes, not {size}" for path, size in known.items() if found.get(path, size) != size
        ]
        problems += [f"{path} was added" for path in sorted(found.keys() - known.keys())]
        if problems or not full:
            return sorted(problems)
        draft = self._draft()
        try:
            self.fetch(address, draft)
            return check(draft, manifest, full=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _repository(self, address: str) -> MlflowArtifactsRepository:
        if urlparse(address).scheme != SCHEME:
            raise InputError(
                f"{address}: this artifact was made by an earlier version of posttrain, which noted a path of one machine; "
                "it can only be used there, without a server"
            )
        found = get_artifact_repository(address, tracking_uri=self.tracking_uri)
        assert isinstance(found, MlflowArtifactsRepository)
        return found

    def _draft(self) -> Path:
        return self.cache / f".{uuid.uuid4().hex}"

    def _kept(self, digest: str) -> Path | None:
        """The cached folder of a digest, as long as nobody has changed it."""
        folder, record = self.cache / digest[:32], self.cache / f"{digest[:32]}.json"
        if not record.is_file():
            return None
        return None if check(folder, Manifest.model_validate_json(record.read_text())) else folder

    def _keep(self, folder: Path, digest: str) -> Path:
        """Move a folder into the cache. Two processes may do so at once: what one of them reads already stays."""
        with lock(self.cache, digest):
            kept = self._kept(digest)
            if kept is None:
                kept = self.cache / digest[:32]
                shutil.rmtree(kept, ignore_errors=True)
                folder.rename(kept)
                (self.cache / f"{kept.name}.json").write_text(read_manifest(kept, "dataset").model_dump_json())
            return kept


def _listing(repository: MlflowArtifactsRepository, path: str | None = None) -> dict[str, int]:
    """Sizes of all files below an address, by path."""
    found: dict[str, int] = {}
    for entry in repository.list_artifacts(path):
        if entry.is_dir:
            found |= _listing(repository, entry.path)
        else:
            found[entry.path] = int(entry.file_size or 0)
    return found


def copy_by_links(source: Path, target: Path) -> None:
    """Copy a folder; on one file system its files are shared, not copied."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
