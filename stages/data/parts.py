"""Rows that a stage makes over many steps, kept in its resume states: what a step made is written once and then linked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.data.parquet import read_rows, write_rows
from stages.run import Run

Row = dict[str, Any]


class Parts:
    """Rows in order: those of the newest state, and those since. `types` are those of columns that may be null for long."""

    def __init__(self, run: Run, types: Mapping[str, pa.DataType]) -> None:
        self.run, self.types = run, types
        self.recent: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; they are lost with the process until the next `save`."""
        if self.run.rank == 0:
            self.recent += rows

    def save(self, folder: Path) -> None:
        """Put all rows into the folder of a new state: earlier parts as links to the same files."""
        earlier = _files(self.run.load_state())
        for file in earlier:
            (folder / file.parent.name).mkdir()
            os.link(file, folder / file.parent.name / file.name)
        if self.recent:
            part = folder / f"part-{len(earlier):06d}"
            part.mkdir()
            write_rows(part, self.recent, types=self.types)
            self.recent = []

    def rows(self) -> Iterator[Row]:
        """All rows, streamed."""
        return chain(*(read_rows(file) for file in _files(self.run.load_state())), self.recent)


def _files(state: Path | None) -> list[Path]:
    return sorted(state.glob("part-*/*.parquet")) if state else []
