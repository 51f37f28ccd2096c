"""What the tests of `prepare` share: the stage on rows, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conftest import request_for

from stages.data.parquet import read_rows
from stages.request import run_stage

Row = dict[str, Any]


class Prepared:
    """What a run of `prepare` made: the rows of its outputs and the counts it recorded."""

    def __init__(self, folder: Path, events: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.train, self.heldout = self._rows("train"), self._rows("heldout")
        self.counts = {row["what"]: row["rows"] for event in events if event["event"] == "table" for row in event["rows"]}
        self.metrics = {
            name: value for event in events if event["event"] == "metrics" for name, value in event["metrics"].items()
        }

    def _rows(self, name: str) -> list[Row]:
        folder = self.folder / "outputs" / name
        return list(read_rows(folder)) if any(folder.glob("*")) else []


def write_source(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(
    folder: Path, source: Path | list[Row], exclude: Path | None = None, also: Path | None = None, **config: Any
) -> Prepared:
    """Run the stage in `folder / "run"`."""
    source = write_source(folder / "source", source) if isinstance(source, list) else source
    given = {"source": source, "also": also, "exclude": exclude}
    inputs = {name: path for name, path in given.items() if path is not None}
    heard: list[dict[str, Any]] = []
    run_stage(request_for("prepare", folder / "run", config, **inputs), heard.append)
    return Prepared(folder / "run", heard)


@contextmanager
def prepared(source: list[Row], **config: Any) -> Iterator[Prepared]:
    with TemporaryDirectory() as folder:
        yield prepare(Path(folder), source, **config)


def prompts(rows: list[Row]) -> list[Any]:
    return [row["prompt"] for row in rows]


def numbered(count: int) -> list[Row]:
    return [{"prompt": f"prompt {n}", "completion": f"completion {n}"} for n in range(count)]


# Some of these stand on either side at every share used here, so that no example is refused for an empty training set.
FIXED = numbered(12)
