"""Pipelines: what is needed is asked for, what waits is pending, what was resolved stays resolved."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import INIT

from stages.errors import InputError
from stages.specs.prepare import PrepareConfig
from stages.specs.sft import SftConfig
from tasks.home import configure_environment
from tasks.pipeline import Pending, Pipeline, resolve_inputs
from tasks.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    return Store(configure_environment())


def planning(store: Store, from_step: str | None = None) -> Pipeline:
    references = {"model": (f"init:{INIT}", "model"), "data": ("procedural:chain-sum/base", "dataset")}
    inputs = resolve_inputs(store, "r", references, None)  # pyright: ignore[reportArgumentType]
    return Pipeline("r", store, inputs, "", only_plan=True, from_step=from_step)


def test_a_step_after_one_that_runs_is_pending(store: Store) -> None:
    pipeline = planning(store)
    data = pipeline.step("data", "prepare", PrepareConfig(rows=5), source=pipeline.input("data"))
    assert data["train"] == Pending("data", "train")
    pipeline.step("sft", "sft", SftConfig(), model=pipeline.input("model"), train=data["train"])
    assert [(name, plan.action) for name, _, plan in pipeline.plans] == [("data", "run"), ("sft", "run")]
    assert pipeline.plans[1][2].reason == "its input comes from the step data, which runs"


def test_missing_inputs_are_named(store: Store) -> None:
    pipeline = planning(store)
    with pytest.raises(InputError, match=r"inputs\.prompts is needed"):
        pipeline.input("prompts")
    with pytest.raises(InputError, match="step sft: the stage sft needs the input train"):
        pipeline.step("sft", "sft", SftConfig(), model=pipeline.input("model"), train=None)


def test_one_input_may_stand_for_another(store: Store) -> None:
    pipeline = planning(store)
    assert pipeline.input("prompts", "data") == pipeline.input("data")
    assert pipeline.input("model", "data") == pipeline.input("model")
    with pytest.raises(InputError, match=r"inputs\.prompts is needed .*and is not given, nor inputs\.rows in its place"):
        pipeline.input("prompts", "rows")


def test_from_step_must_exist(store: Store) -> None:
    pipeline = planning(store, from_step="dato")
    pipeline.step("data", "prepare", PrepareConfig(rows=5), source=pipeline.input("data"))
    with pytest.raises(InputError, match="--from dato: no step has this name; there are data"):
        pipeline.check_from_step()


def test_a_retry_sees_what_the_first_try_saw(store: Store, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    first = resolve_inputs(store, "r", {"data": (str(rows), "dataset")}, "flow-run-1")
    rows.write_text('{"prompt": "b"}\n')
    assert resolve_inputs(store, "r", {"data": (str(rows), "dataset")}, "flow-run-1") == first
    assert resolve_inputs(store, "r", {"data": (str(rows), "dataset")}, "flow-run-2") != first


def test_a_bad_reference_names_its_input(store: Store) -> None:
    with pytest.raises(InputError, match=r"inputs\.data: \./nothing\.jsonl: no such file"):
        resolve_inputs(store, "r", {"data": ("./nothing.jsonl", "dataset")}, None)
