"""Prepare: rows from any source, made canonical, filtered, de-duplicated and split.

The split is by a hash of each row's content (`split_by`, the prompt by default): adding rows never moves an old one across
it, and sources that share a problem agree on its side. What is held out is then removed from training by prompt as well.

Two passes over the source, so that nothing but hashes is held in memory (and a slice's rows, which are written in its own
order): the first learns which prompts are held out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import digest_of
from stages.data.parquet import RowWriter, read_schema
from stages.data.schemas import CANONICAL, TEXTS, canonical, in_form, prompt_text, row_id
from stages.data.slices import taken
from stages.data.sources import read_source
from stages.errors import InputError
from stages.run import Run
from stages.specs.prepare import Filters, PrepareConfig

Row = dict[str, Any]
# What tells prompts, demonstrations, preferences, rankings and step labels apart.
KIND = tuple(name for name in CANONICAL if name not in ("id", "prompt", "margin"))
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think>...</think> and <answer>...</answer> tags, respectively, i.e., <think> reasoning "
    "process here </think><answer> answer here </answer>.\nUser: {prompt}. Assistant:"
)
GSM8K_ANSWER = re.compile(r"####\s*(.+?)\s*$")


def prepare(config: PrepareConfig, run: Run, *, source: Path, also: Path | None = None, exclude: Path | None = None) -> None:
    """Write `train` and, when a share is held out, `heldout`: the rows of `source`, and then those of `also`, which may have
    other columns. Raises InputError, naming the row, for rows it cannot use."""
    sources = [source] if also is None else [source, also]
    excluded = {_hash(row["prompt"]) for row in run.rows(exclude)} if exclude else set()
    heldout_prompts, others, names = set[str](), set[str](), dict[str, None]()
    for row in _rows(config, sources, Counter()):
        names |= dict.fromkeys(row)
        if _held_out(config, row):
            heldout_prompts.add(_hash(row["prompt"]))
        elif config.slice is not None:
            others.add(_hash(row["prompt"]))
    types = {} if also is None else _types(config, sources, names)
    chosen: dict[str, list[Row]] = {}
    if config.slice is not None:
        chosen = {prompt: [] for prompt in taken(others - heldout_prompts - excluded, config.slice)}

    counts: Counter[str] = Counter()
    train = RowWriter(run.output("train"), types=types)
    heldout = RowWriter(run.output("heldout"), types=types)
    for row in _rows(config, sources, counts):
        if also is not None:
            row = row | {name: None for name in names if name not in row}
        if _held_out(config, row):
            if config.max_heldout is not None and counts["held out"] >= config.max_heldout:
                counts["held out beyond max_heldout, left out"] += 1
            else:
                heldout.add(row)
                counts["held out"] += 1
        elif (prompt := _hash(row["prompt"])) in heldout_prompts or prompt in excluded:
            counts["removed from training: prompt is held out"] += 1
        elif config.slice is not None and prompt not in chosen:
            counts["outside the slice"] += 1
        else:
            counts["training"] += 1
            if config.slice is None:
                train.add(row)
            else:
                chosen[prompt].append(row)
    for row in chain.from_iterable(chosen.values()):
        train.add(row)

    run.table("rows", [{"what": what, "rows": count} for what, count in counts.items()])
    if not counts["training"]:
        raise InputError(
            f"no row is left for training: {dict(counts) or 'the source is empty'}; look at the filters and the split"
        )
    run.log(0, {"rows_train": train.close(), "rows_heldout": heldout.close()})


def _types(config: PrepareConfig, sources: Sequence[Path], names: Iterable[str]) -> dict[str, pa.DataType]:
    """What several datasets hold in the columns that stay as they are. Raises InputError for one that is not yet prepared, or a
    column of two types."""
    changed = {"id", *config.columns, *config.constants}
    changed |= ({"prompt"} if config.chat else set()) | ({"answer"} if config.extract == "gsm8k" else set())
    types: dict[str, pa.DataType] = {}
    for field in (field for folder in sources for field in read_schema(folder)):
        if field.name not in names or field.name in changed:
            continue
        if types.setdefault(field.name, field.type) != field.type:
            raise InputError(
                f'the column "{field.name}" holds {types[field.name]} in one dataset and {field.type} in the other: they '
                "cannot be one; leave it out of one of them in the step that prepares it"
            )
    return types


def _rows(config: PrepareConfig, sources: Sequence[Path], counts: Counter[str]) -> Iterator[Row]:
    """Canonical rows after filters and de-duplication; what is left out is counted."""
    seen: set[str] = set()
    first: Row | None = None
    for where, raw in chain(*(read_source(source, config) for source in sources)):
        counts["read"] += 1
        try:
            row = _canonical(config, raw, where)
        except InputError as error:
            if config.unusable == "refuse":
                raise
            counts[f"unusable: {str(error).removeprefix(where).lstrip(':, ')}"] += 1
            continue
        reason = _filtered(config.filters, row)
        if reason:
            counts[f"filtered: {reason}"] += 1
            continue
        first = first or row
        if type(row["prompt"]) is not type(first["prompt"]):
            raise InputError(f'{where}: "prompt" is {_kind(row["prompt"])}, earlier rows had the other kind; set `chat: true`')
        if differs := _differs(first, row):
            if config.unusable == "refuse":
                raise InputError(f"{where}: {differs}")
            counts[f"unusable: {differs}"] += 1
            continue
        if config.deduplicate and row["id"] in seen:
            counts["duplicates"] += 1
            continue
        seen.add(row["id"])
        yield row


def _canonical(config: PrepareConfig, raw: Row, where: str) -> Row:
    for column in config.columns.values():
        if column not in raw:
            raise InputError(f'{where}: no column "{column}", which `columns` maps (it has {", ".join(sorted(raw))})')
    mapped = {name: raw[source] for name, source in config.columns.items()}
    others = {name: value for name, value in raw.items() if name not in config.columns.values()}
    row = canonical(others | mapped, where, config.keep_empty)
    if config.template is not None:
        if not isinstance(row["prompt"], str):
            raise InputError(f"{where}: `template` is for text, and the prompt is a list of messages; use `system` for these")
        template = R1_ZERO if config.template == "r1-zero" else config.template
        row["prompt"] = template.replace("{prompt}", row["prompt"])
    if config.chat and isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if config.system and not isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "system", "content": config.system}, *row["prompt"]]
    row |= config.constants
    if config.extract == "gsm8k":
        row["answer"] = _gsm8k_answer(row, where)
    row = in_form(row, config.form, where)
    ordered = {name: row[name] for name in CANONICAL if name in row}
    return {"id": row_id(row), **ordered, **{name: value for name, value in sorted(row.items()) if name not in ordered}}


def _differs(first: Row, row: Row) -> str | None:
    """In words, what makes a row no demonstration, preference or whatever else the first one is."""
    for name in KIND:
        if name in first and name not in row:
            return f'no column "{name}", which the first row has'
        if name in row and name not in first:
            return f'a column "{name}", which the first row has not'
    return None


def _gsm8k_answer(row: Row, where: str) -> str:
    text = str(row.get("answer") or row.get("completion") or "")
    found = GSM8K_ANSWER.search(text)
    if not found:
        raise InputError(f'{where}: no "#### answer" at the end of {text[-60:]!r}')
    return found.group(1).replace(",", "")


def _filtered(filters: Filters, row: Row) -> str | None:
    """Why a row is dropped, or None."""
    prompt = len(prompt_text(row["prompt"]))
    lengths = [len(row[name]) for name in TEXTS if name in row]
    if prompt < filters.min_prompt_chars:
        return "prompt too short"
    if filters.max_prompt_chars is not None and prompt > filters.max_prompt_chars:
        return "prompt too long"
    if any(length < filters.min_completion_chars for length in lengths):
        return "completion too short"
    if filters.max_completion_chars is not None and any(length > filters.max_completion_chars for length in lengths):
        return "completion too long"
    for column, value in filters.equals.items():
        if column not in row:
            raise InputError(f'`filters.equals` names the column "{column}"; the rows have {", ".join(row)}')
        if str(row[column]) != value:
            return f"{column} is not {value}"
    return None


def _held_out(config: PrepareConfig, row: Row) -> bool:
    if config.split_by not in row:
        raise InputError(f'`split_by` names the column "{config.split_by}"; the rows have {", ".join(row)}')
    return int(_hash(row[config.split_by])[:12], 16) < config.heldout * 16**12


def _hash(value: Any) -> str:
    return digest_of(value)


def _kind(prompt: Any) -> str:
    return "text" if isinstance(prompt, str) else "a list of messages"
