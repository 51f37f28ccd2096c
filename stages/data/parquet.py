"""Reading and writing a dataset's folder: Parquet written in one canonical way, so that equal rows give equal bytes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import InputError

ROWS_PER_GROUP = 4096
MISFIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)


class RowWriter:
    """Streams rows to `folder/data.parquet`. Without a schema it is inferred from the first 4096 rows, but for the columns in
    `types`: a column that may be null for long says there what it holds."""

    def __init__(self, folder: Path, schema: pa.Schema | None = None, types: Mapping[str, pa.DataType] | None = None) -> None:
        self.folder = folder
        self.count = 0
        self._schema = schema
        self._types = types or {}
        self._group: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Raises InputError, naming row and column, for one that does not fit the columns."""
        self._group.append(row)
        if len(self._group) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> int:
        """Finish the file and return the number of rows. Without rows nothing is written unless a schema was given."""
        if self._group or (self._writer is None and self._schema is not None):
            self._flush()
        if self._writer is not None:
            self._writer.close()
        return self.count

    def _flush(self) -> None:
        if self._schema is None:
            self._schema = _inferred(self._group, self._types)
        _refuse_unknown(self._group, self._schema, self.count)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self.folder / "data.parquet", self._schema, compression="zstd", write_statistics=False
            )
        try:
            table = pa.Table.from_pylist(self._group, schema=self._schema)
            for field in self._schema:
                _check_whole([row.get(field.name) for row in self._group], field.type)
        except MISFIT:
            raise _misfit(self._group, self._schema, self.count) from None
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self.count += len(self._group)
        self._group = []


def _inferred(rows: list[dict[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Schema:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: types.get(name) or _inferred_type(name, [row.get(name) for row in rows]) for name in names}
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in columns.items()])


def _inferred_type(name: str, values: list[Any]) -> pa.DataType:
    """The type of all values. Raises InputError naming the first row whose value fits no type of those before it."""
    if _fit(values):
        return pa.array(values).type
    fitting = bisect.bisect_left(range(1, len(values) + 1), True, key=lambda count: not _fit(values[:count]))
    raise _wrong(fitting + 1, name, values[fitting], pa.array(values[:fitting]).type)


def _fit(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except MISFIT:
        return False
    return True


def _refuse_unknown(rows: list[dict[str, Any]], schema: pa.Schema, before: int) -> None:
    """Arrow would leave out a column that the schema lacks without a word."""
    known = set(schema.names)
    for number, row in enumerate(rows, start=before + 1):
        if row.keys() - known:
            column = next(name for name in row if name not in known)
            raise InputError(
                f'row {number}: column "{column}" is not among those of the earlier rows: {", ".join(schema.names)}'
            )


def _check_whole(values: list[Any], kind: pa.DataType) -> None:
    """Raise ArrowInvalid for a fraction in a column of integers, or of lists of them: Arrow would cut it off without a word."""
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if pa.types.is_integer(inner):
        pa.array(values).cast(kind, safe=True)


def _wrong(number: int, column: str, value: Any, kind: pa.DataType) -> InputError:
    return InputError(f'row {number}: column "{column}" holds {value!r}, where earlier rows hold {kind}')


def _misfit(rows: list[dict[str, Any]], schema: pa.Schema, before: int) -> InputError:
    for number, row in enumerate(rows, start=before + 1):
        for field in schema:
            try:
                pa.array([row.get(field.name)], type=field.type)
                _check_whole([row.get(field.name)], field.type)
            except MISFIT:
                return _wrong(number, field.name, row.get(field.name), field.type)
    raise AssertionError("called for rows that fit")


def write_rows(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    schema: pa.Schema | None = None,
    types: Mapping[str, pa.DataType] | None = None,
) -> int:
    """Write rows as `folder/data.parquet` and return how many there were. Raises InputError when there is none."""
    writer = RowWriter(folder, schema, types)
    for row in rows:
        writer.add(row)
    if not writer.close():
        raise InputError(f"{folder.name}: no rows to write; the dataset would be empty")
    return writer.count


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a dataset's folder in order. Raises InputError when there are none."""
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder] if folder.is_file() else []
    if not files:
        raise InputError(f"{folder}: no Parquet file there; a dataset is a folder of *.parquet files")
    return files


def open_file(path: Path) -> pq.ParquetFile:
    """Open one Parquet file, memory-mapped. Raises InputError when it is cut short or is no Parquet."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path.name}: not a readable Parquet file, perhaps cut short ({error})") from error


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Stream the rows of a dataset's folder, in order."""
    for path in parquet_files(folder):
        for batch in open_file(path).iter_batches(batch_size=ROWS_PER_GROUP):
            yield from batch.to_pylist()


def read_schema(folder: Path) -> pa.Schema:
    """The columns of a dataset's folder."""
    return open_file(parquet_files(folder)[0]).schema_arrow


def count_rows(folder: Path) -> int:
    """How many rows a dataset's folder holds, from the files' footers."""
    return sum(open_file(path).metadata.num_rows for path in parquet_files(folder))
