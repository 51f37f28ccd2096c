"""Rejection sampling: demonstrations from a policy's or a teacher's samples (DeepSeek-R1; rl4llm 6.7.3).

    for the samples of each prompt:
        score each by every criterion
        reject, in this order: cut off; too short or long; outside a criterion's bounds; equal to one kept already
        keep at most per_prompt of the rest: the best, the shortest or any
    pass_rate of a prompt = accepted samples / samples, before doubles are left out

What a criterion has no verdict on is rejected by it, and counted apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import digest_of
from stages.data.grouping import together
from stages.data.parquet import RowWriter, count_rows, read_schema
from stages.data.recorded import of_one_sample
from stages.data.schemas import row_id
from stages.errors import InputError
from stages.rewards.learned import load_judges, model_arguments
from stages.rewards.mix import Mixed, Mixture
from stages.rollouts.seeds import sample_seed
from stages.run import Run
from stages.specs.rejection import RejectionConfig
from stages.training.setup import accelerator_for

Row = dict[str, Any]
Scored = tuple[Row, Mixed]
CHUNK = 1024


def rejection(
    config: RejectionConfig,
    run: Run,
    *,
    samples: Path,
    **judges: Path,
) -> None:
    """Write `train`, `heldout` when a share is held out, and `prompts` with their pass rates; `judges` are the models
    that criteria read. Raises InputError before anything is scored when a criterion lacks its column, and when nothing is
    accepted."""
    accelerator = accelerator_for(config.runtime)
    models = load_judges(config.criteria, judges, accelerator.device)
    mixture = Mixture(config.criteria, model_arguments(models, config.runtime.micro_batch_tokens))
    schema = read_schema(samples)
    for name in ("id", "prompt", "completion"):
        if name not in schema.names:
            raise InputError(f'the samples have no column "{name}" (they have {", ".join(schema.names)})')
    mixture.check(schema.names, "the samples")
    for number, row in enumerate(run.rows(samples), start=1):
        mixture.check_row(row, f"samples row {number}")
        if row.get("length") is None and (config.min_length or config.max_length is not None):
            raise InputError(f'samples row {number}: it has no "length", which min_length and max_length are about')

    own: dict[str, pa.DataType] = {field.name: field.type for field in schema}
    scores = dict.fromkeys(("reward", *(f"rewards.{key}" for key in mixture.keys)), pa.float64())
    demonstrations = own | {"id": pa.string(), "prompt_id": own["id"], **scores}
    prompts = own | {"samples": pa.int64(), "pass_rate": pa.float64()}
    types = {"train": demonstrations, "heldout": demonstrations, "prompts": prompts}
    writers = {name: RowWriter(run.output(name), types=types[name]) for name in types}
    counts: Counter[str] = Counter()
    groups, total = together(run.rows(samples)), count_rows(samples)
    while chunk := list(islice(groups, CHUNK)):
        rows = [row for group in chunk for row in group]
        verdicts = iter(mixture([row["completion"] for row in rows], rows))
        for group in chunk:
            accepted, kept = _chosen(config, [(row, next(verdicts)) for row in group], counts)
            writers["prompts"].add(_prompt(group[0]) | {"samples": len(group), "pass_rate": accepted / len(group)})
            for one in kept:
                writers["heldout" if _held_out(config, group[0]) else "train"].add(_demonstration(*one))
        run.progress(counts["samples"], total, f"{counts['kept']} kept")
    _report(run, counts, {name: writer.close() for name, writer in writers.items()})


def _report(run: Run, counts: Counter[str], rows: dict[str, int]) -> None:
    run.table("samples", [{"what": what, "number": number} for what, number in counts.items()])
    if not rows["train"]:
        reasons = ", ".join(f"{what}: {number}" for what, number in counts.items())
        raise InputError(f"no demonstration is left for training ({reasons}); look at the criteria's bounds")
    accepted = counts["samples"] - sum(number for what, number in counts.items() if what.startswith("rejected"))
    run.log(0, {f"rows_{name}": number for name, number in rows.items()} | {"accepted": accepted / counts["samples"]})


def _chosen(config: RejectionConfig, group: Sequence[Scored], counts: Counter[str]) -> tuple[int, list[Scored]]:
    """How many of a prompt's samples are accepted, and which of them are kept."""
    counts["samples"] += len(group)
    accepted: list[Scored] = []
    for row, mixed in group:
        if (why := rejected(config, row, mixed)) is None:
            accepted.append((row, mixed))
        else:
            counts[f"rejected: {why}"] += 1
    left = accepted
    if config.deduplicate:
        firsts: dict[str, Scored] = {}
        for one in accepted:
            firsts.setdefault(" ".join(one[0]["completion"].split()), one)
        left = list(firsts.values())
    counts["doubles"] += len(accepted) - len(left)
    kept = sorted(left, key=lambda one: _rank(config, *one))[: config.per_prompt]
    counts["beyond the cap"] += len(left) - len(kept)
    counts["kept"] += len(kept)
    return len(accepted), kept


def rejected(config: RejectionConfig, row: Row, mixed: Mixed) -> str | None:
    """Why a sample is rejected, or None."""
    length = row.get("length")
    if config.complete and row.get("finish") == "length":
        return "cut off"
    if length is not None and length < config.min_length:
        return "too short"
    if length is not None and config.max_length is not None and length > config.max_length:
        return "too long"
    for one in config.criteria:
        if one.bounded and one.key in mixed.parts:
            value = mixed.parts[one.key]
            if value is None:
                return f"no verdict of {one.key}"
            if one.minimum is not None and value < one.minimum:
                return f"{one.key} below {one.minimum:g}"
            if one.maximum is not None and value > one.maximum:
                return f"{one.key} above {one.maximum:g}"
    return None


def _rank(config: RejectionConfig, row: Row, mixed: Mixed) -> float:
    """The smaller, the sooner it is kept; ties stay in the samples' order."""
    if config.choose == "best":
        return math.inf if mixed.total is None else -mixed.total
    if config.choose == "shortest":
        return float(len(row["completion"]))
    # By its text, since a sample may have no number.
    name = f"rejection/{row['id']}/{row['completion']}"
    return float(sample_seed(config.seed, int(row.get("step") or 0), name, int(row.get("sample") or 0)))


def _demonstration(row: Row, mixed: Mixed) -> Row:
    """A canonical row: what it says, and where it comes from."""
    said = {"prompt": row["prompt"], "completion": row["completion"]}
    scores = {"reward": mixed.total} | {f"rewards.{key}": value for key, value in mixed.parts.items()}
    return row | scores | {"id": row_id(said), "prompt_id": row["id"]}


def _prompt(row: Row) -> Row:
    return {name: value for name, value in row.items() if not of_one_sample(name)}


def _held_out(config: RejectionConfig, row: Row) -> bool:
    """By a hash of its own, apart from that of `prepare`, which has split these prompts once already."""
    return int(digest_of(["rejection", row["prompt"]])[:12], 16) < config.heldout * 16**12
