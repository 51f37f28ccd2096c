"""One flow a stage: the form it shows, what it demands, and that it shares what pipelines computed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import INIT, ROOT
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from test_cli import COMMAND, environment_for, posttrain, stages

from flows.recipe import parse, read_recipe
from flows.runner import plan_pipeline
from flows.single import definition
from stages.errors import InputError
from stages.specs import STAGES
from tasks.execute import execute
from tasks.home import configure_environment
from tasks.plan import StepCall
from tasks.references import resolve
from tasks.store import Store

PREPARE: dict[str, Any] = {"rows": 20, "heldout": 0.2, "seed": 0}
SFT: dict[str, Any] = {
    "steps": 300,
    "batch_size": 4,
    "generations": 2,
    "sampling": {"max_new_tokens": 4},
    "optimizer": {"lr": 1e-3},
    "runtime": {"save_every": 20, "device": "cpu"},
}
INPUTS = {"model": f"init:{INIT}", "train": "datasets:/pipeline-data-train/1"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in which a pipeline's step `data` made train and held-out rows."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    store = Store(configure_environment())
    source = resolve(store, "procedural:chain-sum/demonstrations", "dataset")
    call = StepCall(recipe="pipeline", name="data", stage="prepare", config=PREPARE, inputs={"source": source}, pipeline="p")
    execute.fn(call)
    return store


def planned(path: Path, values: dict[str, Any], *settings: str, from_step: str | None = None) -> tuple[str, str]:
    """What a run of this recipe would do, and why."""
    path.write_text(yaml.safe_dump(values))
    flow = definition(values["flow"])
    recipe = parse(flow.recipe, read_recipe(path, settings), path.name)
    ((name, stage, plan),) = plan_pipeline(recipe, flow.steps, from_step).plans
    assert name == stage == values["flow"]
    return plan.action, plan.reason


@pytest.mark.parametrize("stage", STAGES)
def test_the_form_of_every_stage_asks_for_its_ports_and_config(stage: str) -> None:
    """What each field says is tested with all other forms, in test_forms.py."""
    schema = parameter_schema(definition(stage).flow.fn).model_dump()
    recipe = schema["definitions"][schema["properties"]["recipe"]["$ref"].rpartition("/")[2]]
    assert set(recipe["properties"]) == {"name", "seed", "inputs", "launch", "pools", stage}
    assert set(recipe["required"]) == {"name", "inputs", stage}
    inputs = schema["definitions"][recipe["properties"]["inputs"]["$ref"].rpartition("/")[2]]
    assert set(inputs["properties"]) == set(STAGES[stage].inputs)
    assert inputs["required"] == [name for name, port in STAGES[stage].inputs.items() if port.required]
    config = schema["definitions"][recipe["properties"][stage]["$ref"].rpartition("/")[2]]
    assert set(config["properties"]) == set(STAGES[stage].config.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_finds_every_stages_flow(stage: str) -> None:
    found = load_flow_from_entrypoint(f"flows.single.{stage}")
    assert found is definition(stage).flow
    assert found.name == stage


def test_what_a_pipeline_computed_is_skipped(store: Store, tmp_path: Path) -> None:
    """Under another name and in another recipe: neither is part of the key."""
    recipe: dict[str, Any] = {
        "flow": "prepare",
        "inputs": {"source": "procedural:chain-sum/demonstrations"},
        "prepare": {"rows": 20, "heldout": 0.2},
    }
    path = tmp_path / "alone.yaml"
    assert planned(path, recipe) == ("skip", "same config and inputs")
    assert planned(path, recipe, from_step="prepare") == ("run", "asked for by --from")
    assert planned(path, recipe, "prepare.rows=21")[0] == "run"
    assert planned(path, recipe, "seed=5")[0] == "run"
    assert planned(path, recipe, "inputs.exclude=datasets:/pipeline-data-train/1")[0] == "run"
    with pytest.raises(InputError, match=r"inputs\.exclude: models:/x/1: a dataset is needed here"):
        planned(path, recipe, "inputs.exclude=models:/x/1")
    with pytest.raises(InputError, match="step prepare: the stage prepare needs the input source"):
        planned(path, recipe, "inputs.source=''")
    with pytest.raises(InputError, match="--from data: no step has this name; there are prepare"):
        planned(path, recipe, from_step="data")
    # As the form sends it.
    ended: Any = definition("prepare").flow.fn({"name": "web", "inputs": {"source": "datasets:/nothing/3"}, "prepare": {}}, "")
    assert ended.is_failed()
    assert ended.message.startswith("inputs.source: datasets:/nothing/3: no such dataset; there are pipeline-data-heldout")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("inputs={}",), "x.yaml: inputs.model is missing: A model: models:/NAME/VERSION"),
        (("inputs={}",), "x.yaml: inputs.train is missing: A dataset: datasets:/NAME/VERSION"),
        (("inputs.tran=./x",), r"unknown key inputs.tran; did you mean train\?"),
        (("inputs.train=",), "inputs.train: .*valid string"),
        (("sft.step=3",), r"unknown key sft.step; did you mean steps\?"),
    ],
)
def test_what_is_refused_when_the_recipe_is_read(tmp_path: Path, settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(tmp_path / "x.yaml", {"flow": "sft", "inputs": INPUTS, "sft": SFT}, *settings)


def test_a_stage_without_its_config_or_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        planned(tmp_path / "x.yaml", {"flow": "sft"})
    said = ["inputs is missing: References, of model, train at least.", "sft is missing: The stage's config."]
    assert str(raised.value).splitlines() == [f"x.yaml: {line}" for line in said]


def test_a_stage_alone_is_killed_and_goes_on(store: Store, tmp_path: Path) -> None:
    recipe = {"flow": "sft", "name": "alone", "inputs": INPUTS, "sft": SFT}
    path = tmp_path / "recipe.yaml"
    assert planned(path, recipe) == ("run", "never ran")
    arguments = [*COMMAND, "run", str(path), "--json", "--seed", "7"]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(arguments, cwd=ROOT, env=environment_for(store.root), stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not list(store.root.glob("runs/*/state/step-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert planned(path, recipe, "seed=7") == ("resume", "was interrupted; its state is saved")

    (alone,) = stages(posttrain(store.root, "run", str(path), "--json", "--seed", "7")).values()
    assert (alone["name"], alone["stage"], alone["status"]) == ("sft", "sft", "resumed")
    assert {made["name"] for made in alone["artifacts"].values()} == {"alone-sft", "alone-sft-generations"}
    assert planned(path, recipe, "seed=7") == ("skip", "same config and inputs")
    # A pipeline with the same config and inputs takes it from there.
    inputs = {port: resolve(store, text, "model" if port == "model" else "dataset") for port, text in INPUTS.items()}
    call = StepCall(recipe="p", name="tune", stage="sft", config=SFT | {"seed": 7}, inputs=inputs, pipeline="")
    result = execute.fn(call)
    assert (result.status, json.loads(result.model_dump_json())["artifacts"]) == ("skipped", alone["artifacts"])
