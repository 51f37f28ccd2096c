"""A stage's only way to an effect: one folder.

    run folder/
        request.json     what to do (written by the launcher)
        events.jsonl     metrics, progress, tables and saved states, one JSON object a line
        work/            scratch that may be rebuilt (tokenised rows)
        state/step-N/    the newest resume state, complete or absent
        outputs/NAME/    what the stage makes
        outputs.json     written last: the stage is done

Nothing here knows Prefect or MLflow: a launcher listens to the events, directly in the same process or by following the file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.artifacts import Kind
from stages.data.parquet import read_rows

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Run:
    """One execution of one stage in one folder. Ranks above 0 read and compute; only rank 0 writes events."""

    def __init__(
        self,
        folder: Path,
        outputs: Mapping[str, Kind],
        key: str = "",
        listener: Listener | None = None,
        rank: int | None = None,
    ) -> None:
        self.folder = folder
        self.key = key
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._outputs = dict(outputs)
        self._listener = listener
        folder.mkdir(parents=True, exist_ok=True)
        self.work = folder / "work"
        self.work.mkdir(exist_ok=True)

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The rows of a dataset's folder, in order, streamed."""
        return read_rows(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers at a step. Values that are not finite are recorded as null: JSON has no NaN."""
        self._emit("metrics", step=step, metrics=_finite({name: float(value) for name, value in metrics.items()}))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say how far the stage is, with the two or three numbers that matter in `note`."""
        self._emit("progress", done=done, total=total, note=note)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a small table for a person to read (counts of filters, a few generations)."""
        self._emit("table", name=name, rows=[_finite(row) for row in rows])

    def message(self, text: str) -> None:
        """Record one line for the log."""
        self._emit("message", text=text)

    @contextmanager
    def new_state(self, step: int, barrier: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """A folder to write a resume state into; on leaving, it becomes the one that `load_state` finds.

        A crash at any moment leaves either the old state or the new one. Every rank enters with the same step; `barrier`
        makes the ranks wait for each other.
        """
        root = self.folder / "state"
        draft = root / f".draft-{step:08d}"
        if self.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        yield draft
        barrier()
        if self.rank == 0:
            _sync(draft)
            # A second state of one step gets a name of its own, which sorts behind: the first stays until it is there.
            before = max(root.glob(f"step-{step:08d}*"), default=None)
            serial = f".{int(before.suffix[1:] or 0) + 1:03d}" if before else ""
            final = root / f"step-{step:08d}{serial}"
            draft.rename(final)
            for old in root.iterdir():
                if old != final:
                    shutil.rmtree(old)
            self._emit("state", step=step)
        barrier()

    def load_state(self) -> Path | None:
        """The folder of the newest complete resume state, or None when the stage starts anew."""
        states = sorted((self.folder / "state").glob("step-*"))
        return states[-1] if states else None

    def output(self, name: str) -> Path:
        """An empty folder for an output; what an earlier, killed try left there is removed."""
        if name not in self._outputs:
            raise KeyError(f"this stage declares the outputs {sorted(self._outputs)}, not {name!r}")
        folder = self.folder / "outputs" / name
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def done(self) -> None:
        """Declare the outputs complete. Called by whoever started the stage, after it returned."""
        if self.rank != 0:
            return
        made = {name: kind for name, kind in self._outputs.items() if any((self.folder / "outputs" / name).glob("*"))}
        for name in made:
            _sync(self.folder / "outputs" / name)
        draft = self.folder / ".outputs.json"
        draft.write_text(json.dumps({"key": self.key, "outputs": made}, indent=2))
        draft.replace(self.folder / "outputs.json")
        self._emit("done")

    def _emit(self, event: str, **fields: Any) -> None:
        if self.rank != 0:
            return
        record = {"event": event, **fields}
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._listener is not None:
            self._listener(record)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with None for numbers that JSON cannot say."""
    return {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in values.items()}


def _sync(folder: Path) -> None:
    """Force a folder's files to the disk, so that the rename which follows never outlives them."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
