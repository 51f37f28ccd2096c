"""What a person sees in Prefect's page while steps run: a bar a step, a table of those that have ended, links, log lines.

All of it is used inside a flow run, with servers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import get_client
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from stages.run import Event
from tasks.home import server
from tasks.store import Store

if TYPE_CHECKING:
    from tasks.execute import StepResult

UPDATE_SECONDS = 2.0


class Live:
    """A Prefect progress artifact a step, with the numbers that matter as its text."""

    def __init__(self) -> None:
        self._bars: dict[str, UUID] = {}
        self._updated = 0.0

    def begin(self, step: str, note: str) -> None:
        del step, note

    def note(self, step: str, note: str) -> None:
        get_run_logger().info("%s: %s", step, note)

    def event(self, step: str, event: Event) -> None:
        if event["event"] == "message":
            get_run_logger().info("%s: %s", step, event["text"])
        if event["event"] != "progress":
            return
        done, total = event["done"], event["total"]
        if done < total and time.monotonic() - self._updated < UPDATE_SECONDS:
            return
        self._updated = time.monotonic()
        percent, text = 100 * done / max(total, 1), f"{step}: {done}/{total} {event['note']}"
        if step in self._bars:
            update_progress_artifact(self._bars[step], progress=percent, description=text)
        else:
            self._bars[step] = _id(create_progress_artifact(progress=percent, key=_key(step), description=text))

    def end(self, step: str, note: str) -> None:
        if step in self._bars:
            update_progress_artifact(self._bars.pop(step), progress=100, description=f"{step}: {note}")


class Table:
    """One Prefect table of a pipeline's steps, which grows as they end."""

    def __init__(self, store: Store, recipe: str) -> None:
        self._store, self._recipe = store, recipe
        self._table: UUID | None = None

    def __call__(self, results: Sequence[StepResult]) -> None:
        rows = [
            {
                "step": result.name,
                "what": result.status,
                "seconds": result.seconds,
                "held-out numbers": result.headline,
                "artifacts": ", ".join(map(str, result.artifacts.values())),
                "made by": f"[MLflow run]({run_page(self._store, result.run_id)})",
            }
            for result in results
        ]
        if self._table is None:
            self._table = _id(
                create_table_artifact(rows, key=_key(self._recipe, "steps"), description=f"{self._recipe}: its steps")
            )
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._table, ArtifactUpdate(data=json.dumps(rows)))


def show_table(rows: Sequence[Mapping[str, str]], key: str, description: str) -> None:
    """A table in this flow run's page."""
    create_table_artifact([dict(row) for row in rows], key=_key(key), description=description)


def link(store: Store, run_id: str, step: str) -> None:
    """Lead from this flow run's page to an MLflow run's, and back."""
    create_link_artifact(run_page(store, run_id), link_text=f"{step} in MLflow", key=_key(step, "mlflow"))
    here = url_for("flow-run", obj_id=str(flow_run.id))
    store.client.set_tag(run_id, "posttrain.flow_run", here or str(flow_run.id))
    # MLflow's page shows this text above all else, with its links.
    store.client.set_tag(run_id, "mlflow.note.content", f"Run by Prefect's flow run [{flow_run.name}]({here})")


def run_page(store: Store, run_id: str) -> str:
    """The address of an MLflow run's page."""
    return f"{server()}/#/experiments/{store.client.get_run(run_id).info.experiment_id}/runs/{run_id}"


def _key(*parts: str) -> str:
    """Prefect takes keys of small letters, digits and dashes alone."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _id(made: object) -> UUID:
    """Prefect's functions return what they made, whatever their types say, where no event loop runs."""
    assert isinstance(made, UUID)
    return made
