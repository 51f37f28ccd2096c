"""Events to MLflow: batches, no step twice, no values that are not numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.record import Recorder
from tasks.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def new_run(store: Store) -> str:
    return store.begin("r", "s", {"key": "k", "stage": "s", "step": "s", "recipe": "r"}, {"config": {}})


def steps(store: Store, run_id: str) -> list[int]:
    return [metric.step for metric in store.client.get_metric_history(run_id, "loss")]


def record(recorder: Recorder, step: int, value: float | None = 1.0) -> None:
    recorder({"event": "metrics", "step": step, "metrics": {"loss": value}})


def test_metrics_wait_for_a_flush(store: Store) -> None:
    run_id = new_run(store)
    recorder = Recorder(store, run_id)
    record(recorder, 1)
    record(recorder, 2)
    assert steps(store, run_id) == []
    recorder.flush()
    assert steps(store, run_id) == [1, 2]


def test_a_resumed_stage_logs_no_step_twice(store: Store) -> None:
    run_id = new_run(store)
    first = Recorder(store, run_id)
    for step in (1, 2, 3):
        record(first, step)
    first.flush()
    second = Recorder(store, run_id)
    for step in (2, 3, 4):
        record(second, step)
    second.flush()
    assert steps(store, run_id) == [1, 2, 3, 4]


def test_null_values_are_left_out(store: Store) -> None:
    run_id = new_run(store)
    recorder = Recorder(store, run_id)
    record(recorder, 1, None)
    recorder.flush()
    assert steps(store, run_id) == []


def test_tables_become_json_in_mlflows_layout(store: Store) -> None:
    run_id = new_run(store)
    Recorder(store, run_id)({"event": "table", "name": "train rows", "rows": [{"what": "used", "rows": 3}, {"what": "cut"}]})
    address = str(store.client.get_run(run_id).info.artifact_uri)
    table = json.loads(store.files.read(address, "tables/train_rows.json") or b"null")
    assert table == {"columns": ["what", "rows"], "data": [["used", 3], ["cut", None]]}
