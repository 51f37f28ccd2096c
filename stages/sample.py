"""Sample: K completions a prompt from any policy.

    for each batch of prompts:
        each process takes its share of it and draws K completions a prompt
        the first process gathers them, in the prompts' order
    every save_every batches: save what was drawn

Each sample has its own seed, derived from (seed, prompt, sample), so what is drawn does not depend on the batch it is drawn
in. Prompts that fill the context are dropped and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from stages.data.parquet import count_rows, read_schema, write_rows
from stages.data.parts import Parts
from stages.errors import InputError
from stages.models.load import load_policy
from stages.rollouts.sample import RECORDED, sample_rows
from stages.run import Run
from stages.specs.sample import SampleConfig
from stages.training.setup import accelerator_for, count_parameters, set_threads

Row = dict[str, Any]


def sample(config: SampleConfig, run: Run, *, policy: Path, prompts: Path) -> None:
    """Write `samples`: the rows of `prompts`, each `config.samples` times, with a completion."""
    accelerator = accelerator_for(config.runtime)
    model = load_policy(policy, config.dtype)
    set_threads(config.runtime, count_parameters(model.model))
    model.model.to(accelerator.device).eval()  # pyright: ignore[reportArgumentType]
    parts = Parts(run, {field.name: field.type for field in read_schema(prompts) if field.name not in RECORDED})
    total = min(count_rows(prompts), config.prompts or count_rows(prompts))
    size = max(1, config.runtime.generation_batch // config.samples) * accelerator.num_processes

    done, dropped = _resume(run)
    rows = islice(run.rows(prompts), done, total)
    batches = 0
    while batch := list(islice(rows, size)):
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        samples, unfit = sample_rows(
            model,
            mine,
            config.sampling,
            seed=config.seed,
            samples=config.samples,
            batch_size=config.runtime.generation_batch,
        )
        place = {id(row): number for number, row in enumerate(batch)}
        found = gather_object([(place[id(one.row)], one.record(0, "policy")) for one in samples])
        parts.add([record for _, record in sorted(found, key=lambda pair: pair[0])])
        done, dropped, batches = done + len(batch), dropped + sum(gather_object([unfit])), batches + 1
        run.progress(done, total, f"{done * config.samples} samples")
        if batches % config.runtime.save_every == 0 and done < total:
            _save(run, accelerator.wait_for_everyone, done, dropped, parts)

    if accelerator.is_main_process:
        _write(run, parts, dropped)
    accelerator.wait_for_everyone()


def _save(run: Run, barrier: Callable[[], None], done: int, dropped: int, parts: Parts) -> None:
    """A resume state after `done` prompts."""
    with run.new_state(done, barrier) as folder:
        if run.rank == 0:
            parts.save(folder)
            kept = {"done": done, "dropped": dropped, "threads": torch.get_num_threads()}
            (folder / "loop.json").write_text(json.dumps(kept))


def _resume(run: Run) -> tuple[int, int]:
    """How many prompts are done, and how many of them were dropped; the threads are those of the first try."""
    folder = run.load_state()
    if folder is None:
        return 0, 0
    kept = json.loads((folder / "loop.json").read_text())
    torch.set_num_threads(kept["threads"])
    return kept["done"], kept["dropped"]


def _write(run: Run, parts: Parts, dropped: int) -> None:
    """All samples as one dataset, with their numbers. Raises InputError when there is none."""
    count = lengths = truncated = 0

    def records() -> Iterator[Row]:
        nonlocal count, lengths, truncated
        for record in parts.rows():
            count, lengths, truncated = count + 1, lengths + record["length"], truncated + (record["finish"] == "length")
            yield record
        if not count:
            raise InputError("every prompt fills the model's context: nothing was sampled")

    write_rows(run.output("samples"), records(), types=parts.types)
    metrics = {"samples": count, "length": lengths / count, "truncated": truncated / count, "prompts_dropped": dropped}
    run.log(0, metrics)
    first = list(islice(parts.rows(), 4))
    run.table("samples", [{"prompt": str(row["prompt"])[-60:], "completion": row["completion"][:120]} for row in first])
