"""How long a step of GRPO takes to sample and verify, with the verifiers beside the sampling and after it.

    uv run python tests/benchmarks/beside.py [--steps 4] [--pairs 5]

Pairs of equal runs, the order within a pair turned each time. For each verifier: the median seconds of sampling and verifying a
step in both ways, the median of the pairs' ratios, and when the first verdict was there, as a share of the time until the last
completion had ended (below 1: before it). `math` reads each completion as an answer in a box, on this machine's other cores; on
two cores it competes with the sampling. `wait` sleeps instead: it stands for verifiers on cores that the sampling leaves alone,
as beside a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.rewards import REWARDS, pool
from stages.rewards.base import RewardEntry, Row, Score

TESTS = Path(__file__).parents[1]
WAIT = 0.01  # seconds a completion


def boxed(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """`math`, with each completion in a box, as a model that has learnt the form would write it."""
    from stages.rewards.math import math

    return math([f"\\boxed{{{text}}}" for text in completions], rows)


def wait(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    time.sleep(WAIT * len(completions))
    return [Score(len(text) % 2) for text in completions]


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def verifying_after() -> Iterator[None]:
    """Completions are handed over when all have ended."""
    import stages.grpo

    waiting: list[Any] = []

    def later(original: Any) -> Any:
        return lambda begun: lambda *ended: waiting.append((original(begun), ended))

    def first_hand_over(original: Any) -> Any:
        def give(*given: Any) -> Any:
            for hand_over, ended in waiting:
                hand_over(*ended)
            waiting.clear()
            return original(*given)

        return give

    with patched(stages.grpo, "verify_as_ended", later), patched(stages.grpo, "give_rewards", first_hand_over):
        yield


def run(folder: Path, data: Path, verifier: str, steps: int) -> tuple[float, float]:
    """Median seconds of sampling and verifying a step; the first verdict's time as a share of the last completion's."""
    import stages.grpo
    from stages.request import InputFolder, Request, run_stage
    from stages.specs import STAGES

    spec, (model, prompts) = STAGES["grpo"], (data / "init", data / "prompts")
    config = spec.config.model_validate(
        {
            "steps": steps,
            "prompts": 8,
            "group": 8,
            "sampling": {"max_new_tokens": 100},
            "rewards": [{"name": verifier, "timeout": 60}],
            "optimizer": {"lr": 1e-6},
            "runtime": {"device": "cpu", "threads": 1, "generation_batch": 32, "log_every": 1},
        }
    )
    given = {name: InputFolder(path=path, digest=name) for name, path in (("policy", model), ("prompts", prompts))}
    dumped = config.model_dump(mode="json")
    verdicts: list[float] = []
    shares: list[float] = []

    def timed_call(original: Any) -> Any:
        def made(call: Any, *asked: Any) -> None:
            original(call, *asked)
            call._future.add_done_callback(lambda _: verdicts.append(time.perf_counter()))

        return made

    def timed_collect(original: Any) -> Any:
        def collect(*args: Any, **named: Any) -> Any:
            verdicts.clear()
            began.append(time.perf_counter())
            found = original(*args, **named)
            began.append(time.perf_counter())
            return found

        return collect

    def timed_give(original: Any) -> Any:
        def give(*args: Any) -> Any:
            found = original(*args)
            start, ended = began[-2:]
            shares.append((min(verdicts) - start) / (ended - start))
            return found

        return give

    began: list[float] = []
    with (
        patched(pool.Call, "__init__", timed_call),
        patched(stages.grpo, "collect", timed_collect),
        patched(stages.grpo, "give_rewards", timed_give),
    ):
        key = spec.key(config, {name: one.digest for name, one in given.items()})
        done = run_stage(Request(stage="grpo", config=dumped, inputs=given, folder=folder, key=key))
    told = [json.loads(line) for line in (done.folder / "events.jsonl").read_text().splitlines()]
    seconds = [one["metrics"]["seconds_sampling"] for one in told if "seconds_sampling" in one.get("metrics", {})]
    # The first step's include the start of the workers.
    return statistics.median(seconds[1:]), statistics.median(shares[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    for name in ("boxed", "wait"):
        REWARDS[name] = RewardEntry(f"beside:{name}", version=1, columns=("answer",), pooled=True)
    print(f"{pool.workers()} workers, {asked.pairs} pairs of {asked.steps - 1} steps of 64 completions")
    print(f"{'verifier':10}{'after, s':>10}{'beside, s':>11}{'ratio':>8}{'first verdict: after':>22}{'beside':>9}")
    with tempfile.TemporaryDirectory() as made:
        for verifier in ("boxed", "wait"):
            compare(Path(made), verifier, asked.pairs, asked.steps)


def compare(folder: Path, verifier: str, pairs: int, steps: int) -> None:
    data = prepared(folder / f"{verifier} data")
    found: dict[str, list[tuple[float, float]]] = {"beside": [], "after": []}
    for number in range(pairs):
        for how in ("beside", "after") if number % 2 else ("after", "beside"):
            path = folder / f"{verifier} {number} {how}"
            if how == "beside":
                found[how].append(run(path, data, verifier, steps))
            else:
                with verifying_after():
                    found[how].append(run(path, data, verifier, steps))
    ratio = statistics.median(b / a for (b, _), (a, _) in zip(found["beside"], found["after"], strict=True))
    after, beside = (
        tuple(statistics.median(column) for column in zip(*found[how], strict=True)) for how in ("after", "beside")
    )
    print(f"{verifier:10}{after[0]:10.2f}{beside[0]:11.2f}{ratio:8.2f}{after[1]:22.2f}{beside[1]:9.2f}", flush=True)


def prepared(folder: Path) -> Path:
    """A model of random weights that ends its completions after 25 tokens or so, and prompts with numbers as answers."""
    from stages.data.chain_sum import demonstration_rows
    from stages.data.parquet import write_rows
    from stages.models.load import load_policy, save_policy

    (folder / "start").mkdir(parents=True)
    shutil.copyfile(TESTS / "tiny" / "init.yaml", folder / "start" / "init.yaml")
    policy = load_policy(folder / "start")
    save_policy(policy, folder / "init")
    (folder / "prompts").mkdir()
    rows = enumerate(demonstration_rows(64, seed=1))
    write_rows(folder / "prompts", [{"id": f"{n}", "prompt": row["prompt"], "answer": row["answer"]} for n, row in rows])
    return folder


if __name__ == "__main__":
    main()
