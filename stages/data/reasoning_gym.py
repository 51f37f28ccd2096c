"""Procedural tasks of the library `reasoning-gym`, as rows that its scorers can rate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

VERSION = f"1, reasoning-gym {metadata.version('reasoning-gym')}"
# Without the task that mixes tasks, and those whose scorers want tuples, which JSON does not have.
TASKS = sorted(DATASETS.keys() - {"composite", "arc_agi", "rearc"})
ASKED = "\n\nThink first. Then give the final answer, and nothing else, between <answer> and </answer>."


def rows(task: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Questions of a task in its default difficulty, with `answer` (None where the task has many), `task` and `metadata`."""
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=count)
    for number in range(count):
        entry = dataset[number]
        row = {"prompt": [{"role": "user", "content": entry["question"] + ASKED}], "answer": entry["answer"], "task": task}
        yield row | {"metadata": json.dumps(entry["metadata"])}


@lru_cache(maxsize=256)
def scorer(task: str) -> Any:
    """What has a task's `score_answer(answer, entry)`."""
    return reasoning_gym.create_dataset(task)
