"""Publishing and finding artifacts in a real MLflow over SQLite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from stages.artifacts import Dataset, Model
from stages.data.parquet import write_rows
from tasks.store import Store

IDENTITY: dict[str, Any] = {"stage": "sft", "version": 1, "config": {"a": {"b": 1}}, "inputs": {}}
NAMES = {"checkpoint": "r-sft", "generations": "r-sft-generations"}
KINDS: dict[str, Any] = {"checkpoint": "model", "generations": "dataset"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def finished_folder(root: Path, text: str = "weights") -> Path:
    """What a finished stage leaves."""
    folder = root / "runs" / "x"
    for output in KINDS:
        (folder / "outputs" / output).mkdir(parents=True)
    (folder / "outputs" / "checkpoint" / "model.safetensors").write_text(text)
    write_rows(folder / "outputs" / "generations", [{"id": "a", "prompt": "p"}])
    return folder


def begun(store: Store, key: str = "k") -> str:
    return store.begin("r", "sft", {"key": key, "stage": "sft", "step": "sft", "recipe": "r"}, IDENTITY)


def publish(store: Store, run_id: str, folder: Path) -> dict[str, Dataset | Model]:
    return store.publish(run_id, folder, KINDS, NAMES, {})


def test_nothing_is_found_before_the_complete_tag(store: Store) -> None:
    run_id = begun(store)
    assert store.find("k") == (None, None)
    unfinished = store.unfinished(key="k")
    assert unfinished is not None
    assert unfinished.info.run_id == run_id


def test_publish_then_find(store: Store) -> None:
    made = publish(store, begun(store), finished_folder(store.root))
    published, _ = store.find("k", full=True)
    assert published is not None
    assert published.outputs == made
    assert (store.locate(made["checkpoint"]) / "model.safetensors").read_text() == "weights"
    assert pq.read_table(store.locate(made["generations"])).num_rows == 1
    assert made["generations"].version == "1"
    assert store.unfinished(key="k") is None


def test_publishing_moves_and_copies_nothing(store: Store) -> None:
    folder = finished_folder(store.root)
    inode = (folder / "outputs" / "checkpoint" / "model.safetensors").stat().st_ino
    made = publish(store, begun(store), folder)
    assert (store.locate(made["checkpoint"]) / "model.safetensors").stat().st_ino == inode


def test_handles_carry_no_path_of_this_machine(store: Store) -> None:
    made = publish(store, begun(store), finished_folder(store.root))
    assert str(store.root) not in json.dumps([handle.model_dump() for handle in made.values()])


def test_versions_count_up_and_equal_bytes_have_equal_digests(store: Store) -> None:
    first = publish(store, begun(store, "k1"), finished_folder(store.root))
    second = publish(store, begun(store, "k2"), finished_folder(store.root))
    assert [made["checkpoint"].version for made in (first, second)] == ["1", "2"]
    assert first["checkpoint"].digest == second["checkpoint"].digest


CALLS = (
    "create_logged_model",
    "set_tag",
    "finalize_logged_model",
    "set_logged_model_tags",
    "create_registered_model",
    "create_model_version",
    "log_outputs",
    "write",
    "set_terminated",
)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("before", [True, False])
def test_publishing_again_after_a_crash(store: Store, method: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at each call to MLflow and each write, before or after it; the next try ends with one version each."""
    run_id, folder = begun(store), finished_folder(store.root)
    owner = store.files if method == "write" else store.client
    original = getattr(owner, method)

    def die(*args: Any, **kwargs: Any) -> None:
        if not before:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, die)
        with pytest.raises(KeyboardInterrupt):
            publish(store, run_id, folder)
    # Only what comes after the complete tag may be missing from a run that is found.
    assert (store.find("k")[0] is not None) == (method == "set_terminated")
    made = publish(store, run_id, folder)
    assert {handle.version for handle in made.values()} == {"1"}
    published, damage = store.find("k", full=True)
    assert published is not None, damage
    assert published.outputs == made


def test_crash_at_the_move(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, folder = begun(store), finished_folder(store.root)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tasks.files.shutil.move", die)
        with pytest.raises(KeyboardInterrupt):
            publish(store, run_id, folder)
    assert store.find("k") == (None, None)
    assert publish(store, run_id, folder)["checkpoint"].version == "1"


def damage_bytes(path: Path) -> None:
    path.write_text("WEIGHTS")


def damage_keep_time(path: Path) -> None:
    stat = path.stat()
    path.write_text("WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage_add(path: Path) -> None:
    (path.parent / "extra.bin").write_text("x")


@pytest.mark.parametrize(
    ("damage", "full", "words"),
    [
        (damage_bytes, False, "other bytes"),
        (damage_keep_time, True, "other bytes"),
        (Path.unlink, False, "missing"),
        (damage_add, False, "added"),
    ],
)
def test_damage_is_found(store: Store, damage: Callable[[Path], None], full: bool, words: str) -> None:
    made = publish(store, begun(store), finished_folder(store.root))
    damage(store.locate(made["checkpoint"]) / "model.safetensors")
    published, reason = store.find("k", full=full)
    assert published is None
    assert reason is not None
    assert words in reason


def test_touched_but_equal_files_are_whole(store: Store) -> None:
    made = publish(store, begun(store), finished_folder(store.root))
    (store.locate(made["checkpoint"]) / "model.safetensors").touch()
    assert store.find("k")[0] is not None


def test_parameters_and_provenance_are_recorded(store: Store) -> None:
    run = store.client.get_run(begun(store))
    assert run.data.params == {"a.b": "1"}
    assert run.data.tags["posttrain.version.torch"]
    assert store.identity(run) == IDENTITY


def test_lineage_links_model_versions(store: Store) -> None:
    before = publish(store, begun(store, "base"), finished_folder(store.root))
    base, run_id, folder = before["checkpoint"], begun(store, "child"), finished_folder(store.root)
    inputs = {"model": base, "train": before["generations"], "heldout": before["generations"]}
    made = store.publish(run_id, folder, KINDS, NAMES, inputs)
    assert store.publish(run_id, folder, KINDS, NAMES, inputs) == made, "again, as after a crash: nothing twice"
    run: Any = store.client.get_run(run_id)
    assert [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs] == [
        ("r-sft-generations/1", before["generations"].digest[:12])
    ]
    model = store.client.get_logged_model(made["checkpoint"].uri.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "r-sft", "version": "2"}]
    assert model.params == {"a.b": "1"}
    assert [entry.model_id for entry in run.inputs.model_inputs] == [base.uri.removeprefix("models:/")]
    assert [entry.model_id for entry in run.outputs.model_outputs] == [made["checkpoint"].uri.removeprefix("models:/")]


def test_first_use_by_several_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tasks.store import Store\nstore = Store(Path(sys.argv[1]))\n"
        "store.begin('r', 's', {'key': sys.argv[2], 'stage': 's', 'step': 's', 'recipe': 'r'}, {'config': {}})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], cwd=ROOT) for n in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert len(Store(tmp_path).runs(recipe="r")) == 3
