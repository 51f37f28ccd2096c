"""From an artifact back to what made it: what is told, what is said of what is gone, what is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import INIT
from mlflow.entities import RunTag
from rich.console import Console
from test_cli import posttrain

from stages.artifacts import Dataset, Model
from stages.data.parquet import write_rows
from stages.errors import InputError
from stages.specs import STAGES
from tasks.execute import execute
from tasks.home import configure_environment
from tasks.lineage import Node, _node, print_lineage, trace
from tasks.plan import StepCall
from tasks.references import resolve
from tasks.store import Store

Handles = dict[str, Dataset | Model]


def store_at(root: Path) -> Store:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("POSTTRAIN_HOME", str(root))
        return Store(configure_environment())


def published(store: Store, step: str, stage: str, config: dict[str, Any], inputs: Handles, recipe: str = "r") -> Handles:
    """A step's outputs as a run leaves them, with files of no meaning in place of what the stage would have made."""
    call = StepCall(recipe=recipe, name=step, stage=stage, config=config, inputs=inputs, pipeline="p")
    tags = {"key": call.key(), "stage": stage, "step": step, "recipe": recipe, "pipeline": "p"}
    run_id = store.begin(recipe, step, tags, call.identity())
    folder = store.root / "runs" / run_id
    for output, kind in STAGES[stage].outputs.items():
        place = folder / "outputs" / output
        place.mkdir(parents=True)
        if kind == "model":
            (place / "model.safetensors").write_text(step)
        else:
            write_rows(place, [{"id": str(n), "prompt": output} for n in range(3)])
    names = {output: call.registered_name(output) for output in STAGES[stage].outputs}
    return store.publish(run_id, folder, STAGES[stage].outputs, names, inputs)


def make_pipeline(store: Store) -> dict[str, Handles]:
    """rows -> data (run for real) -> tuned twice: `sft` on the base, `more` on `sft` with the same rows as both inputs."""
    source = resolve(store, "procedural:chain-sum/demonstrations", "dataset")
    config = {"rows": 20, "heldout": 0.25}
    call = StepCall(recipe="r", name="data", stage="prepare", config=config, inputs={"source": source}, pipeline="p")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("POSTTRAIN_HOME", str(store.root))
        data = execute.fn(call).artifacts
    base = resolve(store, f"init:{INIT}", "model")
    sft = published(store, "sft", "sft", {"seed": 4, "optimizer": {"lr": 1.0}}, {"model": base, **data})
    inputs = {"model": sft["checkpoint"], "train": data["train"], "heldout": data["train"]}
    return {"data": dict(data), "sft": sft, "more": published(store, "more", "sft", {}, inputs, recipe="later")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With the pipeline, for tests that only read."""
    return store_at(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def pipeline(store: Store) -> dict[str, Handles]:
    return make_pipeline(store)


def told(nodes: list[Node]) -> str:
    console = Console(file=StringIO(), width=400)
    print_lineage(console, nodes)
    said: Any = console.file
    return "\n".join(line.rstrip() for line in said.getvalue().splitlines())


def by_name(nodes: list[Node]) -> dict[str, Node]:
    return {str(node): node for node in nodes}


def test_every_artifact_with_what_made_it(store: Store, pipeline: dict[str, Handles]) -> None:
    nodes = trace(store, "models:/later-more/1")
    found = by_name(nodes)
    assert str(nodes[0]) == "later-more/1"
    source, init = (
        "source-procedural-chain-sum-demonstrations/1",
        next(name for name in found if name.startswith("source-init")),
    )
    assert set(found) == {"later-more/1", "r-sft/1", "r-data-train/1", "r-data-heldout/1", source, init}
    assert len({node.uri for node in nodes}) == len(nodes)
    addresses = {node.uri: str(node) for node in nodes}
    inputs = {str(node): {port: addresses[uri] for port, uri in node.inputs.items()} for node in nodes}
    assert inputs == {
        "later-more/1": {"model": "r-sft/1", "train": "r-data-train/1", "heldout": "r-data-train/1"},
        "r-sft/1": {"model": init, "train": "r-data-train/1", "heldout": "r-data-heldout/1"},
        "r-data-train/1": {"source": source},
        "r-data-heldout/1": {"source": source},
        source: {},
        init: {},
    }
    for name, made in (("r-sft/1", pipeline["sft"]["checkpoint"]), ("r-data-train/1", pipeline["data"]["train"])):
        assert (found[name].digest, found[name].uri, found[name].kind) == (made.digest, made.uri, made.kind)
    sft, data = found["r-sft/1"].made, found["r-data-train/1"].made
    assert sft is not None
    assert data is not None
    assert (sft.recipe, sft.step, sft.stage, sft.version) == ("r", "sft", "sft", STAGES["sft"].version)
    assert sft.config == {"seed": 4, "optimizer.lr": 1.0}
    assert data.config == {"rows": 20, "heldout": 0.25}
    assert data.seconds is not None
    assert data.seconds > 0
    assert sft.packages["torch"]
    assert found["later-more/1"].made is not None
    assert found["later-more/1"].made.config == {}
    assert (found[source].source, found[init].source) == ("procedural:chain-sum/demonstrations", f"init:{INIT}")
    rows = {name: node.rows for name, node in found.items() if node.rows is not None}
    assert rows == {"r-data-train/1": 20 - rows["r-data-heldout/1"], "r-data-heldout/1": rows["r-data-heldout/1"]}
    assert not [node for node in nodes if node.problems]


def test_an_artifact_reached_by_many_ways_is_read_once(
    store: Store, pipeline: dict[str, Handles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the work doubles with every step behind it that takes two things from one place."""
    read: list[str] = []

    def counted(store: Store, given: Dataset | Model) -> Any:
        read.append(str(given))
        return _node(store, given)

    monkeypatch.setattr("tasks.lineage._node", counted)
    nodes = trace(store, "models:/later-more/1")
    assert read == [str(node) for node in nodes]


def test_a_tree_tells_each_artifact_once(store: Store, pipeline: dict[str, Handles]) -> None:
    lines = told(trace(store, "models:/later-more/1")).splitlines()
    assert lines[0].startswith("later-more/1  model  ")
    assert sum("made by r's step sft: stage sft, version 1; commit " in line for line in lines) == 1
    assert any(line.endswith("with seed=4, optimizer.lr=1.0") for line in lines)
    mentions = [line.strip("│├└─ ").split("  ") for line in lines if "r-data-train/1  " in line]
    assert [line[0] for line in mentions] == ["train: r-data-train/1"] * 2 + ["heldout: r-data-train/1"]
    assert [line[-1] for line in mentions] == [pipeline["data"]["train"].digest[:12], "(above)", "(above)"]
    assert sum("made together with r-data-train/1 (above)" in line for line in lines) == 1
    assert sum("made by r's step data" in line for line in lines) == 1
    assert sum("ingested from procedural:chain-sum/demonstrations; " in line for line in lines) == 1
    assert sum("under " in line and "torch " in line for line in lines) == 1, "versions stand at the root alone"


def test_what_differs_from_the_root_is_told(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_pipeline(store)
    run_id = store.runs(step="sft")[0].info.run_id
    commit = RunTag("mlflow.source.git.commit", "0123456789abcdef-dirty")
    store.client.log_batch(run_id, tags=[RunTag("posttrain.version.torch", "1.0"), commit])
    nodes = trace(store, "models:/later-more/1")
    made = by_name(nodes)["r-sft/1"].made
    assert made is not None
    assert (made.commit, made.dirty, made.packages["torch"]) == ("0123456789abcdef", True, "1.0")
    lines = told(nodes).splitlines()
    assert any(line.endswith("under torch 1.0") for line in lines)
    assert any("stage sft, version 1; commit 01234567 (dirty); " in line for line in lines)


def test_aliases_datasets_and_the_environment_name_a_root(
    store: Store, pipeline: dict[str, Handles], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.client.set_registered_model_alias("r-data-train", "best", "1")
    monkeypatch.setenv("WHICH", "best")
    (node, leaf) = trace(store, "datasets:/r-data-train@${WHICH}")
    assert (str(node), leaf.source) == ("r-data-train/1", "procedural:chain-sum/demonstrations")


def test_what_is_gone_or_damaged_is_said(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    pipeline = make_pipeline(store)

    def problems() -> dict[str, list[str]]:
        nodes = trace(store, "models:/later-more/1")
        said = told(nodes)
        assert all(problem in said for node in nodes for problem in node.problems)
        return {str(node): node.problems for node in nodes if node.problems}

    (store.locate(pipeline["data"]["heldout"]) / "data.parquet").unlink()
    assert problems() == {"r-data-heldout/1": ["data.parquet is missing"]}

    sft = store.runs(step="sft")[0]
    artifacts = store.root / "artifacts" / str(sft.info.artifact_uri).removeprefix("mlflow-artifacts:/")
    (artifacts / "identity.json").unlink()
    shutil.rmtree(artifacts / "manifests")
    found = problems()["r-sft/1"]
    assert found[0].startswith(f"run {sft.info.run_id}: its manifest of checkpoint is gone")
    assert found[1:] == ["its identity.json is gone: its config is not known"]

    (artifacts / "inputs.json").unlink()
    store.client.delete_run(sft.info.run_id)
    found = problems()
    assert found["r-sft/1"][0] == f"its run {sft.info.run_id} was deleted"
    assert found["r-sft/1"][-1] == "its inputs.json is gone: what it was made from is not known"

    source = store.runs(stage="ingest", step="source-procedural-chain-sum-demonstrations")[0].info.run_id
    with sqlite3.connect(store.root / "mlflow.db") as database:  # as `mlflow gc` does
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", (source,))
    assert problems()["source-procedural-chain-sum-demonstrations/1"] == [
        "its run is gone, or was none of posttrain: what made it is not known"
    ]


def test_a_root_that_never_completed_or_is_not_ours(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    run_id = store.begin("r", "s", {"key": "k", "stage": "s", "step": "s", "recipe": "r"}, {"config": {"a": {"b": 1}}})
    store.client.create_registered_model("r-s", tags={"kind": "dataset"})
    store.client.create_model_version("r-s", f"runs:/{run_id}/rows", run_id)
    (node,) = trace(store, "datasets:/r-s/1")
    assert node.problems[0] == f"its run {run_id} never completed"
    assert node.made is not None
    assert node.made.config == {"a.b": 1}, "of a stage that this code does not know, all of it"
    assert "made by r's step s" in told([node])
    store.client.create_model_version("r-s", str(shutil.copytree(INIT.parent, tmp_path / "m")))
    (node,) = trace(store, "datasets:/r-s/2")
    assert "none of posttrain" in node.problems[0]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("./rows.jsonl", r"\./rows\.jsonl: a registered artifact is written models:/NAME/VERSION"),
        ("models:/r-sft", "a registered artifact is written"),
        ("models:/r-sfd/1", "no such model; near: r-sft"),
        ("models:/r-sft/9", "no such model; it has the versions 1"),
        ("models:/r-data-train/1", "r-data-train is a dataset, not a model; write datasets:/r-data-train/1"),
    ],
)
def test_what_is_refused(store: Store, pipeline: dict[str, Handles], reference: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        trace(store, reference)


def test_the_command(store: Store, pipeline: dict[str, Handles]) -> None:
    done = posttrain(store.root, "lineage", "models:/later-more/1", "--json")
    assert done.returncode == 0, done.stderr
    nodes = [Node.model_validate(node) for node in json.loads(done.stdout)["nodes"]]
    assert nodes == trace(store, "models:/later-more/1")
    shown = posttrain(store.root, "lineage", "datasets:/r-data-train/1")
    assert shown.stdout.startswith("r-data-train/1  dataset  ")
