"""Tokenised rows in one memory-mapped Arrow file: as many rows as the disk holds, read by index without copying."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

ROWS_PER_BATCH = 4096
SCHEMA = pa.schema([("ids", pa.large_list(pa.int32())), ("prompt_length", pa.int32()), ("row", pa.int64())])


class TokenTable:
    """Sequences of token ids. `prompt_lengths[i]` is where sequence i's completion starts; `rows[i]` its row in the source."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._ids = [chunk for chunk in table["ids"].chunks if len(chunk)]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._ids)])
        self.prompt_lengths: np.ndarray = table["prompt_length"].to_numpy()
        self.rows: np.ndarray = table["row"].to_numpy()
        self.lengths: np.ndarray = np.concatenate(
            [np.diff(chunk.offsets.to_numpy()) for chunk in self._ids] or [np.zeros(0, dtype=np.int64)]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, index: int) -> np.ndarray:
        """The token ids of one sequence."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._ids[part][int(index - self._starts[part])].values.to_numpy()

    @classmethod
    def write(cls, path: Path, sequences: Iterable[tuple[list[int], int, int]]) -> None:
        """Write (ids, prompt length, source row) triples; the file appears whole or not at all."""
        draft = path.with_suffix(".draft")
        with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            group: list[tuple[list[int], int, int]] = []
            for sequence in sequences:
                group.append(sequence)
                if len(group) == ROWS_PER_BATCH:
                    writer.write_batch(_batch(group))
                    group = []
            if group:
                writer.write_batch(_batch(group))
        draft.replace(path)


def _batch(group: list[tuple[list[int], int, int]]) -> pa.RecordBatch:
    ids, prompt_lengths, rows = zip(*group, strict=True)
    arrays = [pa.array(column, type=field.type) for column, field in zip((ids, prompt_lengths, rows), SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)
