"""Raw rows from whatever a reference points to, each with the words that say where it stood."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stages.data.parquet import open_file
from stages.data.procedural import procedural
from stages.errors import InputError
from stages.specs.prepare import PrepareConfig

RawRow = tuple[str, dict[str, Any]]
PROCEDURAL_FILE = "procedural.json"


def read_source(folder: Path, config: PrepareConfig) -> Iterator[RawRow]:
    """(where, row) pairs of a source's folder, streamed, at most `config.rows` of them.

    Reads a procedural source, flat files (JSONL, gzipped too, JSON, CSV, Parquet) or a clone of a hub dataset. Raises
    InputError for a line that is no JSON object, an unreadable file, an unknown format.
    """
    if (folder / PROCEDURAL_FILE).is_file():
        return _procedural(folder, config)
    if (folder / ".gitattributes").is_file():
        return islice(_hub(folder, config), config.rows)
    return islice(read_files(folder), config.rows)


def read_files(folder: Path) -> Iterator[RawRow]:
    """(where, row) pairs of the flat files in a folder and below it, streamed. Raises InputError as `read_source` does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for path in files:
        yield from _file(path, path.relative_to(folder).as_posix())


def _procedural(folder: Path, config: PrepareConfig) -> Iterator[RawRow]:
    name = json.loads((folder / PROCEDURAL_FILE).read_text())["name"]
    if config.rows is None:
        raise InputError(f"procedural:{name} makes as many rows as it is asked for: set `rows` in the step that prepares it")
    for number, row in enumerate(procedural(name).rows(config.rows, config.seed), start=1):
        yield f"procedural:{name} row {number}", row


def _hub(folder: Path, config: PrepareConfig) -> Iterator[RawRow]:
    from datasets import get_dataset_config_names, load_dataset

    name, number = f"{folder.name}/{config.split}", 0
    part, inner = config.config, None
    try:
        # Some datasets (HH-RLHF) keep their parts in folders and declare no configs for them.
        if part and (folder / part).is_dir() and part not in get_dataset_config_names(str(folder)):
            part, inner = None, part
        rows = load_dataset(str(folder), part, data_dir=inner, split=config.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name} row {number}", dict(row)
    except (ValueError, OSError) as error:  # an unknown config or split, no data files, a file cut short
        raise InputError(f"{name}: cannot be read after row {number}: {error}") from error


def _file(path: Path, name: str) -> Iterator[RawRow]:
    readers = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in readers:
        raise InputError(f"{name}: cannot read rows from a {suffix or 'file without suffix'}; use one of {', '.join(readers)}")
    number = 0
    try:
        for number, row in enumerate(readers[suffix](path, name), start=1):
            yield f"{name} row {number}", row
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read after row {number}: {error}") from error


def _jsonl(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{name} line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{name} line {number}: a row must be a JSON object, this is a {type(row).__name__}")
            yield row


def _json(path: Path, name: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name}: must be a list of objects")
    yield from rows


def _csv(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise InputError(f"{name} line {reader.line_num}: has more values than the header has columns")
            yield row


def _parquet(path: Path, name: str) -> Iterator[dict[str, Any]]:
    del name
    for batch in open_file(path).iter_batches():
        yield from batch.to_pylist()
