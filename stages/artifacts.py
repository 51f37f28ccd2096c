"""Artifacts by content: handles that travel between steps, and the manifests that say what a folder holds.

A digest depends on file names and bytes alone, so that equal content has equal digests on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stages.errors import InputError

Kind = Literal["dataset", "model"]


class _Handle(BaseModel):
    """What a step receives and returns instead of files: a name, a version, a digest of the content, a logical address."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    digest: str
    uri: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.version else self.name


class Dataset(_Handle):
    """A folder of Parquet files."""

    kind: Literal["dataset"] = "dataset"


class Model(_Handle):
    """A Hugging Face model folder."""

    kind: Literal["model"] = "model"


Handle = Annotated[Dataset | Model, Field(discriminator="kind")]


def handle(kind: Kind, **fields: Any) -> Dataset | Model:
    """Make the handle class of a kind."""
    return Dataset(**fields) if kind == "dataset" else Model(**fields)


class FileEntry(BaseModel):
    """One file of a manifest. `mtime_ns` lets an unchanged file be trusted without reading it; it is not part of the digest."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str
    mtime_ns: int


class Manifest(BaseModel):
    """What an artifact's folder holds."""

    kind: Kind
    files: list[FileEntry]
    rows: int | None = None
    columns: dict[str, str] | None = None

    @property
    def digest(self) -> str:
        """sha256 over the sorted (path, sha256) pairs."""
        return digest_of(sorted([entry.path, entry.sha256] for entry in self.files))


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """sha256 of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """Hash a folder. Raises InputError when it is missing or holds no file."""
    paths = list(_files(folder)) if folder.is_dir() else []
    if not paths:
        raise InputError(f"{folder}: no files there, so there is nothing to publish or read")
    entries = [
        FileEntry(
            path=path.relative_to(folder).as_posix(),
            size=path.stat().st_size,
            sha256=sha256_file(path),
            mtime_ns=path.stat().st_mtime_ns,
        )
        for path in paths
    ]
    return Manifest(kind=kind, files=entries)


def check(folder: Path, manifest: Manifest, full: bool = False) -> list[str]:
    """Compare a folder with its manifest; return what is wrong, in words (empty: all is well).

    A file whose size and time are those of the manifest is trusted; otherwise, or with `full`, its bytes are hashed.
    """
    problems = []
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            problems.append(f"{entry.path} is missing")
            continue
        stat = path.stat()
        if stat.st_size != entry.size:
            problems.append(f"{entry.path} has {stat.st_size} bytes, not {entry.size}")
        elif (full or stat.st_mtime_ns != entry.mtime_ns) and sha256_file(path) != entry.sha256:
            problems.append(f"{entry.path} has other bytes than were published")
    known = {entry.path for entry in manifest.files}
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} if folder.is_dir() else set()
    problems += [f"{name} was added" for name in sorted(present - known)]
    return problems
