"""Sample: K completions a prompt from any policy, or from a teacher behind an endpoint; of them the best, if asked.

    for each batch of prompts:
        each process takes its share of it and draws K completions a prompt
        best of K: it rates them with the mixed reward (verifiers begin while others are drawn) and keeps each prompt's best
        the first process gathers them, in the prompts' order
    every save_every batches: save what was drawn

Each sample has its own seed, derived from (seed, prompt, sample), so what is drawn does not depend on the batch it is drawn
in; a teacher is sent it. Prompts that fill the context, or that the teacher refuses, are dropped and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stages.data.parquet import count_rows, read_schema, write_rows
from stages.data.parts import Parts
from stages.data.recorded import of_one_sample
from stages.errors import InputError
from stages.models.load import LoadedModel, load_policy
from stages.rewards.learned import load_judges, model_arguments
from stages.rewards.mix import Begun, Mixture
from stages.rollouts.best import Placed, best_of
from stages.rollouts.sample import Sample, sample_rows
from stages.rollouts.teacher import ask_teacher
from stages.run import Run
from stages.specs.sample import SampleConfig
from stages.training.setup import accelerator_for, count_parameters, set_threads

Row = dict[str, Any]
# Of some rows: the samples, which are given to the mixed reward as well, and why it dropped those that it dropped.
Draw = Callable[[Sequence[Row], Begun], tuple[list[Placed], list[str]]]


def sample(
    config: SampleConfig,
    run: Run,
    *,
    prompts: Path,
    policy: Path | None = None,
    **judges: Path,
) -> None:
    """Write `samples`: the rows of `prompts`, each `config.samples` times, or the best of them, with a completion.

    Raises InputError when not exactly one of a policy and an endpoint is given, and, before anything is sampled, for rows that
    no reward can rate. `judges` are the models that rewards read.
    """
    accelerator = accelerator_for(config.runtime)
    total = min(count_rows(prompts), config.prompts or count_rows(prompts))
    models = load_judges(config.best_of.rewards if config.best_of else [], judges, accelerator.device)
    mixture = _mixture(config, models, run, prompts, total)
    draw = _drawer(config, policy, models, accelerator)
    parts = Parts(run, _types(config, prompts))
    size = max(1, config.runtime.generation_batch // config.samples) * accelerator.num_processes

    counts, batches = _resume(run), 0
    rows = (_prompt(row) for row in islice(run.rows(prompts), counts["done"], total))
    while batch := list(islice(rows, size)):
        mine = range(accelerator.process_index, len(batch), accelerator.num_processes)
        with mixture.begin() as begun:
            kept, unfit = draw([batch[place] for place in mine], begun)
            unrated = 0
            if config.best_of:
                kept, unrated = best_of(kept, begun.finish(), mixture.keys, config.best_of.keep)
        found = gather_object([(mine[place], record) for place, record in kept])
        parts.add([record for _, record in sorted(found, key=lambda pair: pair[0])])
        dropped = gather_object(unfit)
        if dropped and not counts["dropped"]:
            run.message(f"a prompt {dropped[0]}, and is dropped")
        counts.update(done=len(batch), dropped=len(dropped), unrated=sum(gather_object([unrated])))
        batches += 1
        run.progress(counts["done"], total, f"{counts['done'] * config.samples} samples")
        if counts["dropped"] == total:
            raise InputError(f"every prompt {dropped[0]}: nothing was sampled")
        if batches % config.runtime.save_every == 0 and counts["done"] < total:
            _save(run, accelerator.wait_for_everyone, counts, parts)

    if accelerator.is_main_process:
        _write(config, run, parts, counts)
    accelerator.wait_for_everyone()


def _prompt(row: Row) -> Row:
    """A row without what it tells of a sample, when the prompts are samples themselves: another's reward would stay with it."""
    return {name: value for name, value in row.items() if not of_one_sample(name)}


def _drawer(config: SampleConfig, policy: Path | None, models: Mapping[str, LoadedModel], accelerator: Accelerator) -> Draw:
    """How completions are drawn: from the policy, or from the teacher. Sets torch's threads."""
    endpoint = config.endpoint
    if policy is not None and endpoint is None:
        model = load_policy(policy, config.dtype)
        set_threads(config.runtime, count_parameters(model.model))
        model.model.to(accelerator.device).eval()  # pyright: ignore[reportArgumentType]

        def from_policy(rows: Sequence[Row], begun: Begun) -> tuple[list[Placed], list[str]]:
            def ended(place: int, sample: Sample) -> None:
                begun.add(place, sample.text, sample.record(0, "policy"))

            drawn, unfit = sample_rows(
                model,
                rows,
                config.sampling,
                seed=config.seed,
                samples=config.samples,
                batch_size=config.runtime.generation_batch,
                ended=ended,
            )
            place = {id(row): number for number, row in enumerate(rows)}
            return [(place[id(one.row)], one.record(0, "policy")) for one in drawn], ["fills the model's context"] * unfit

        return from_policy
    if endpoint is not None and policy is None:
        set_threads(config.runtime, sum(count_parameters(one.model) for one in models.values()))

        def from_teacher(rows: Sequence[Row], begun: Begun) -> tuple[list[Placed], list[str]]:
            drawn, refused = ask_teacher(endpoint, rows, config.sampling, config.seed, config.samples, config.keep_reasoning)
            for place, (_, record) in enumerate(drawn):
                begun.add(place, record["completion"], record)
            return drawn, [f"was refused by the endpoint ({reason})" for reason in refused]

        return from_teacher
    raise InputError("sample needs either a policy as its input or `endpoint` in its config, and not both")


def _mixture(config: SampleConfig, models: Mapping[str, LoadedModel], run: Run, prompts: Path, total: int) -> Mixture:
    """The reward that says which samples are the best, when only these are kept. Refuses prompts that it cannot rate."""
    if config.best_of is None:
        return Mixture([])
    mixture = Mixture(config.best_of.rewards, model_arguments(models, config.runtime.micro_batch_tokens))
    mixture.check(read_schema(prompts).names, "the prompts")
    for number, row in enumerate(islice(run.rows(prompts), total), start=1):
        mixture.check_row(row, f"prompts row {number}")
    return mixture


def _types(config: SampleConfig, prompts: Path) -> dict[str, pa.DataType]:
    """Types of the columns that may be null for long."""
    types = {field.name: field.type for field in read_schema(prompts) if not of_one_sample(field.name)} | {"length": pa.int64()}
    return types | {f"rewards.{part.key}": pa.float64() for part in (config.best_of.rewards if config.best_of else [])}


def _save(run: Run, barrier: Callable[[], None], counts: Counter[str], parts: Parts) -> None:
    """A resume state after so many prompts."""
    with run.new_state(counts["done"], barrier) as folder:
        if run.rank == 0:
            parts.save(folder)
            (folder / "loop.json").write_text(json.dumps({**counts, "threads": torch.get_num_threads()}))


def _resume(run: Run) -> Counter[str]:
    """How many prompts are done, how many of them were dropped, and how many samples got no reward; the threads are those of
    the first try."""
    folder = run.load_state()
    if folder is None:
        return Counter()
    kept = json.loads((folder / "loop.json").read_text())
    torch.set_num_threads(kept.pop("threads"))
    return Counter(kept)


def _write(config: SampleConfig, run: Run, parts: Parts, counts: Counter[str]) -> None:
    """All samples as one dataset, with their numbers. Raises InputError when there is none."""
    seen: Counter[str] = Counter()
    rewards = 0.0

    def records() -> Iterator[Row]:
        nonlocal rewards
        for record in parts.rows():
            seen.update(samples=1, truncated=record["finish"] == "length")
            if record["length"] is not None:
                seen.update(counted=1, length=record["length"])
            rewards += record["reward"] if config.best_of else 0.0
            yield record
        if not seen["samples"]:
            raise InputError(f"none of the {counts['unrated']} samples got a reward, so none is the best")

    write_rows(run.output("samples"), records(), types=parts.types)
    metrics = {
        "samples": seen["samples"],
        "truncated": seen["truncated"] / seen["samples"],
        "prompts_dropped": counts["dropped"],
    }
    if seen["counted"]:
        metrics["length"] = seen["length"] / seen["counted"]
    if config.best_of:
        metrics |= {"reward": rewards / seen["samples"], "unrated": counts["unrated"]}
    run.log(0, metrics)
    first = list(islice(parts.rows(), 4))
    run.table("samples", [{"prompt": str(row["prompt"])[-60:], "completion": row["completion"][:120]} for row in first])
