"""References to handles: every form a person may write, and what is said when it names nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import INIT

from stages.artifacts import Kind, read_manifest
from stages.data.sources import read_files
from stages.errors import InputError
from tasks.references import expand, resolve
from tasks.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for name in ("runs", "leases"):
        (tmp_path / name).mkdir()
    return Store(tmp_path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


def test_local_file_is_copied_once_by_content(store: Store, rows: Path) -> None:
    first = resolve(store, str(rows), "dataset")
    assert resolve(store, str(rows), "dataset") == first
    kept = store.locate(first) / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    second = resolve(store, str(rows), "dataset")
    assert (second.digest != first.digest, second.version) == (True, "2")
    assert '"b"' in kept.read_text(), "the store keeps what an earlier pipeline was given"


def test_a_glob_names_several_files(store: Store, rows: Path) -> None:
    (rows.parent / "more.jsonl").write_text("{}\n")
    made = resolve(store, str(rows.parent / "*.jsonl"), "dataset")
    assert sorted(path.name for path in store.locate(made).iterdir()) == ["more.jsonl", "rows.jsonl"]


def test_a_glob_over_several_folders_loses_no_file(store: Store, tmp_path: Path) -> None:
    deep = tmp_path / "data"
    names = ["a/rows.jsonl", "a/b/rows.jsonl", "a/c/other.jsonl"]
    for number, name in enumerate(names):
        (deep / name).parent.mkdir(parents=True, exist_ok=True)
        (deep / name).write_text(json.dumps({"prompt": str(number)}) + "\n")
    made = store.locate(resolve(store, f"{deep}/**/*.jsonl", "dataset"))
    read = list(read_files(made))
    assert read == [
        ("b/rows.jsonl row 1", {"prompt": "1"}),
        ("c/other.jsonl row 1", {"prompt": "2"}),
        ("rows.jsonl row 1", {"prompt": "0"}),
    ]
    # Files of one folder have their bare names, so that where the folder lies is no part of the digest.
    alone = resolve(store, f"{deep}/a/**/oth*.jsonl", "dataset")
    assert alone.digest == resolve(store, f"{deep}/a/c/other.jsonl", "dataset").digest
    shutil.copytree(deep, tmp_path / "elsewhere")
    assert resolve(store, f"{tmp_path}/elsewhere/**/*.jsonl", "dataset").digest == read_manifest(made, "dataset").digest


def test_folder_and_file_as_model(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert (store.locate(resolve(store, str(folder), "model")) / "config.json").is_file()
    (tmp_path / "m.gguf").write_text("x")
    assert (store.locate(resolve(store, str(tmp_path / "m.gguf"), "model")) / "m.gguf").is_file()


def test_init_and_procedural(store: Store) -> None:
    made = resolve(store, f"init:{INIT}", "model")
    assert (store.locate(made) / "init.yaml").read_text() == INIT.read_text()
    made = resolve(store, "procedural:chain-sum/base", "dataset")
    assert json.loads((store.locate(made) / "procedural.json").read_text())["name"] == "chain-sum/base"


def test_registered_versions_and_aliases(store: Store, rows: Path) -> None:
    made = resolve(store, str(rows), "dataset")
    store.client.set_registered_model_alias(made.name, "best", made.version)
    assert resolve(store, f"datasets:/{made.name}/1", "dataset") == made
    assert resolve(store, f"datasets:/{made.name}@best", "dataset") == made


def test_dry_run_writes_nothing(store: Store, rows: Path) -> None:
    planned = resolve(store, str(rows), "dataset", publish=False)
    assert planned.uri == ""
    assert not store.runs(stage="ingest")
    assert not list((store.root / "runs").iterdir())
    assert resolve(store, str(rows), "dataset").digest == planned.digest


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_HERE", "/data")
    assert expand("${DATA_HERE}/x.jsonl") == "/data/x.jsonl"
    with pytest.raises(InputError, match="NOT_SET_ANYWHERE is not set"):
        expand("${NOT_SET_ANYWHERE}/x")


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("./missing/rows.jsonl", "dataset", "no such file"),
        ("./missing/*.jsonl", "dataset", "no file matches this pattern"),
        ("./test*/*.nothing", "dataset", "no file matches this pattern"),
        ("./**.jsonl", "dataset", "no pattern of files"),
        ("procedural:chain-sum/bas", "dataset", "near: chain-sum/base"),
        ("init:nothing.yaml", "model", "no such file"),
        ("models:/source-a", "model", "models:/NAME/VERSION"),
        ("models:/nothing/1", "model", "no such model"),
        ("datasets:/nothing@best", "dataset", "no such dataset"),
        ("datasets:/x/1", "model", "a model is needed"),
        ("what is this", "model", "not a reference"),
    ],
)
def test_what_does_not_exist(store: Store, reference: str, kind: Kind, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve(store, reference, kind)


def test_near_names_and_versions_are_listed(store: Store, rows: Path) -> None:
    made = resolve(store, str(rows), "dataset")
    with pytest.raises(InputError, match="it has the versions 1"):
        resolve(store, f"datasets:/{made.name}/7", "dataset")
    with pytest.raises(InputError, match=made.name):
        resolve(store, f"datasets:/{made.name[:-1]}/1", "dataset")
    sibling = rows.with_name("row.jsonl")
    with pytest.raises(InputError, match=r"near: rows\.jsonl"):
        resolve(store, str(sibling), "dataset")


def test_hub_repository(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach in tests: what is checked is what we ask of it and what we keep of its answer."""
    asked: dict[str, object] = {}

    def snapshot(name: str, *, repo_type: str, revision: str | None, local_dir: Path, ignore_patterns: object) -> None:
        asked.update(name=name, repo_type=repo_type, revision=revision)
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    made = resolve(store, "org/name@v2", "model")
    assert asked == {"name": "org/name", "repo_type": "model", "revision": "v2"}
    assert [path.name for path in store.locate(made).iterdir()] == ["config.json"]


def test_hub_that_does_not_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match=r"org/name: could not be fetched from the hub \(OSError: no route\)"):
        resolve(store, "org/name", "dataset")
    assert not list((store.root / "runs").iterdir())


def test_an_incomplete_run_is_no_artifact(store: Store, tmp_path: Path) -> None:
    run_id = store.begin("r", "s", {"key": "k", "stage": "s", "step": "s", "recipe": "r"}, {"config": {}})
    store.client.create_registered_model("r-s", tags={"kind": "model"})
    store.client.create_model_version("r-s", str(shutil.copytree(INIT.parent, tmp_path / "m")), run_id)
    with pytest.raises(InputError, match="never completed"):
        resolve(store, "models:/r-s/1", "model")


def test_a_version_of_the_other_kind_is_named_as_it_is_written(store: Store, rows: Path) -> None:
    made = resolve(store, str(rows), "dataset")
    with pytest.raises(InputError, match=rf"{made.name} is a dataset, not a model; write datasets:/{made.name}/1"):
        resolve(store, f"models:/{made.name}/1", "model")


def test_a_version_whose_run_is_gone(store: Store, tmp_path: Path) -> None:
    store.client.create_registered_model("r-s", tags={"kind": "model"})
    store.client.create_model_version("r-s", str(shutil.copytree(INIT.parent, tmp_path / "m")), "0" * 32)
    with pytest.raises(InputError, match=r"its run 0+ is gone"):
        resolve(store, "models:/r-s/1", "model")
