"""What a person sees in Prefect's page while steps run: a bar a step, and lines in the log."""

from __future__ import annotations

import re
import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from stages.run import Event

UPDATE_SECONDS = 2.0


class Live:
    """A Prefect progress artifact a step, with the numbers that matter as its text. Used inside a flow run."""

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
            made = create_progress_artifact(progress=percent, key=artifact_key(step), description=text)
            assert isinstance(made, UUID)
            self._bars[step] = made

    def end(self, step: str, note: str) -> None:
        if step in self._bars:
            update_progress_artifact(self._bars.pop(step), progress=100, description=f"{step}: {note}")


def artifact_key(*parts: str) -> str:
    """Prefect takes keys of small letters, digits and dashes alone."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
