"""Manifests: a digest of names and bytes, and a check that finds every kind of change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from stages.artifacts import Dataset, Handle, Manifest, Model, canonical_json, check, digest_of, handle, read_manifest
from stages.errors import InputError

FILES = {"config.json": b"{}", "weights/part-1.bin": b"abc", "weights.txt": b""}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "artifact", FILES)


def later(path: Path) -> None:
    """Move a file's time by ten seconds."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10_000_000_000))


def overwrite(path: Path, content: bytes) -> None:
    """Change bytes and keep the time."""
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_digest_ignores_place_time_and_order_of_writing(tmp_path: Path, folder: Path) -> None:
    twin = fill(tmp_path / "elsewhere" / "twin", dict(reversed(FILES.items())))
    for name in FILES:
        later(twin / name)
    (twin / "empty folder").mkdir()
    manifest = read_manifest(folder, "model")
    assert read_manifest(twin, "model").digest == manifest.digest
    assert read_manifest(twin, "dataset").digest == manifest.digest
    assert Manifest(kind="model", files=manifest.files[::-1], rows=3).digest == manifest.digest


@pytest.mark.parametrize(
    "changed",
    [
        FILES | {"config.json": b"[]"},
        FILES | {"added": b""},
        {name: content for name, content in FILES.items() if name != "weights.txt"},
        {"config.jsom": b"{}", "weights/part-1.bin": b"abc", "weights.txt": b""},
        {"config.json": b"abc", "weights/part-1.bin": b"{}", "weights.txt": b""},
        {"config.json": b"{}", "weights-part-1.bin": b"abc", "weights.txt": b""},
    ],
    ids=["bytes", "added", "removed", "renamed", "contents swapped", "moved out of its folder"],
)
def test_digest_changes_with_names_and_bytes(tmp_path: Path, folder: Path, changed: dict[str, bytes]) -> None:
    assert read_manifest(fill(tmp_path / "other", changed), "model").digest != read_manifest(folder, "model").digest


def test_digest_is_pinned(folder: Path) -> None:
    """Every key that was ever computed rests on this spelling: a change of it is a change of every key."""
    entries = {entry.path: entry for entry in read_manifest(folder, "model").files}
    assert {name: entry.size for name, entry in entries.items()} == {name: len(content) for name, content in FILES.items()}
    assert entries["weights/part-1.bin"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    spelled = json.dumps([[name, hashlib.sha256(FILES[name]).hexdigest()] for name in sorted(FILES)], separators=(",", ":"))
    assert read_manifest(folder, "model").digest == hashlib.sha256(spelled.encode()).hexdigest()
    assert digest_of({"b": [1, 0.5, None], "a": "é"}) == digest_of({"a": "é", "b": [1, 0.5, None]})
    assert canonical_json({"b": [1, 0.5, None], "a": "é"}) == '{"a":"é","b":[1,0.5,null]}'


def test_an_untouched_or_only_touched_folder_is_well(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    assert check(folder, manifest) == []
    assert check(folder, manifest, full=True) == []
    later(folder / "config.json")
    assert check(folder, manifest) == []


def test_a_copy_elsewhere_is_well(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert check(tmp_path / "copy", read_manifest(folder, "model")) == []


def test_a_changed_byte_is_found(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    (folder / "weights/part-1.bin").write_bytes(b"abd")
    later(folder / "weights/part-1.bin")
    problems = ["weights/part-1.bin has other bytes than were published"]
    assert check(folder, manifest) == problems
    assert check(folder, manifest, full=True) == problems


def test_an_untouched_time_is_trusted_unless_full(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    overwrite(folder / "weights/part-1.bin", b"abd")
    assert check(folder, manifest) == []
    assert check(folder, manifest, full=True) == ["weights/part-1.bin has other bytes than were published"]


def test_another_size_is_found_whatever_the_time(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    overwrite(folder / "config.json", b"{ }")
    assert check(folder, manifest) == ["config.json has 3 bytes, not 2"]


def test_missing_and_added_files_are_found(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    (folder / "weights.txt").unlink()
    (folder / "weights" / "part-2.bin").write_bytes(b"")
    assert check(folder, manifest) == ["weights.txt is missing", "weights/part-2.bin was added"]
    shutil.rmtree(folder)
    assert check(folder, manifest) == [f"{name} is missing" for name in ("config.json", "weights/part-1.bin", "weights.txt")]


def test_nothing_to_read_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    for name in ("hollow", "absent"):
        with pytest.raises(InputError, match="no files there"):
            read_manifest(tmp_path / name, "dataset")


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_equal_values_have_one_spelling(value: object) -> None:
    again = {name: value[name] for name in reversed(value)} if isinstance(value, dict) else value
    assert digest_of(again) == digest_of(value)
    assert digest_of([value]) != digest_of(value)


@pytest.mark.parametrize(("kind", "made"), [("dataset", Dataset), ("model", Model)])
def test_handles_are_frozen_and_survive_json(kind: str, made: type[Dataset] | type[Model]) -> None:
    one = handle(kind, name="rlhf-sft", version="3", digest="d", uri="models:/rlhf-sft/3")  # pyright: ignore[reportArgumentType]
    assert type(one) is made
    assert str(one) == "rlhf-sft/3"
    adapter: TypeAdapter[Dataset | Model] = TypeAdapter(Handle)
    assert adapter.validate_json(one.model_dump_json()) == one
    with pytest.raises(ValidationError):
        one.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
