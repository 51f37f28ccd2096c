"""Passes a stage's events on to MLflow: metrics in batches, tables as JSON that its page shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlflow.entities import Metric

from stages.run import Event
from tasks.store import Store

FLUSH_SECONDS = 2.0
BATCH = 500


class Recorder:
    """A listener that writes to one MLflow run.

    MLflow's steps are append-only, so what a resumed stage computes again, up to the last step already there, is left out:
    it is the same bit for bit.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._client, self._run_id = store, store.client, run_id
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()
        known = self._client.get_run(run_id).data.metrics
        self._last = {name: max(m.step for m in self._client.get_metric_history(run_id, name)) for name in known}

    def __call__(self, event: Event) -> None:
        if event["event"] == "metrics":
            now = int(time.time() * 1000)
            for name, value in event["metrics"].items():
                if value is not None and event["step"] > self._last.get(name, -1):
                    self._waiting.append(Metric(name, value, now, event["step"]))
            if len(self._waiting) >= BATCH or time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()
        elif event["event"] == "table":
            self._store.write(self._run_id, f"tables/{event['name'].replace(' ', '_')}.json", _split(event["rows"]))

    def flush(self) -> None:
        """Write what is waiting."""
        for start in range(0, len(self._waiting), BATCH):
            self._client.log_batch(self._run_id, metrics=self._waiting[start : start + BATCH])
        self._waiting, self._flushed = [], time.monotonic()


def _split(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows in the layout that MLflow's page draws as a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
