"""What the tests of `reward_model` share: requests, rows, the oracle, and what a run left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import request_for
from test_sft import Rows, events
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from stages.data.chain_sum import bare, guess, sloppy, worked
from stages.data.chat import encode
from stages.data.parquet import read_rows
from stages.models.reward import RewardModel, new_reward_model
from stages.request import Request, run_stage
from stages.run import Run

Row = dict[str, Any]
Make = Callable[..., Request]
Fit = Callable[..., Run]


CONFIG: Row = {
    "steps": 4,
    "batch_size": 8,
    "max_length": 96,
    "bootstrap": 200,
    "optimizer": {"lr": 1e-2, "warmup": 0},
    "runtime": {"device": "cpu", "threads": 1, "save_every": 2, "log_every": 1},
}


@pytest.fixture
def request_of(init_folder: Path, dataset: Callable[..., Path], tmp_path: Path) -> Make:
    """A request in a new folder, of the small config with some values changed (mappings are merged) and of rows."""
    numbers = count()

    def make(changes: Row, model: Path = init_folder, **data: Rows) -> Request:
        name = f"data {next(numbers)}"
        (tmp_path / name).mkdir()
        merged = CONFIG | {key: CONFIG[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
        inputs = {key: dataset(rows, f"{name}/{key}") for key, rows in data.items()}
        return request_for("reward_model", tmp_path / name / "run", merged, model=model, **inputs)

    return make


@pytest.fixture
def fit(request_of: Make) -> Fit:
    """Train on rows and return the run; they are held out too when no others are given."""
    return lambda changes, train, held=None, **more: run_stage(request_of(changes, train=train, heldout=held or train, **more))


@pytest.fixture
def pairs(chain_rows: Rows) -> Rows:
    """48 pairs of unequal lengths with margins: a worked solution is better than a wrong one or a guess."""
    rng, rows = random.Random(0), []
    for place, row in enumerate(chain_rows):
        texts = {"chosen": worked(row["problem"]), "rejected": guess(rng) if place % 3 else sloppy(row["problem"], rng)}
        rows.append({"id": row["id"], "prompt": row["prompt"], **texts, "margin": rng.uniform(0, 2)})
    return rows


@pytest.fixture
def rankings(chain_rows: Rows) -> Rows:
    """24 rankings of two to five different completions, not in order, with ties."""
    rng, rows = random.Random(0), []
    for place, row in enumerate(chain_rows[:24]):
        texts = [worked(row["problem"]), bare(30), sloppy(row["problem"], rng), bare(40), bare(50)][: 2 + place % 4]
        order = rng.sample(range(len(texts)), len(texts))
        ranks = [(1, 2, 2, 3, 3)[k] for k in order]
        rows.append({"id": row["id"], "prompt": row["prompt"], "completions": [texts[k] for k in order], "ranks": ranks})
    return rows


@pytest.fixture
def reward(init_folder: Path) -> RewardModel:
    """What training starts from."""
    return new_reward_model(init_folder, seed=0)


def tokens(reward: RewardModel, row: Row, text: str, finish: str = "stop") -> list[int]:
    one = encode(reward.tokenizer, row["prompt"], text, reward.stops)
    return [*one.prompt_ids, *(one.completion_ids[:-1] if finish == "length" else one.completion_ids)]


def long_text(reward: RewardModel, row: Row, length: int) -> str:
    """A completion with which its row has exactly so many tokens."""
    return "1" + "+1" * (length - len(tokens(reward, row, "1")))


def plain(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """The oracle: transformers' own scores of a right-padded batch."""
    pad = model.config.pad_token_id
    ids_BT = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=pad)
    return model(input_ids=ids_BT, attention_mask=(ids_BT != pad).long()).logits[:, 0]


def pair_loss(model: Any, reward: RewardModel, rows: Rows) -> float:
    sides = [plain(model, [tokens(reward, row, row[name]) for row in rows]) for name in ("chosen", "rejected")]
    return -F.logsigmoid(sides[0] - sides[1]).mean().item()


def checkpoint(run: Run) -> Any:
    """A run's checkpoint, by plain transformers."""
    return AutoModelForSequenceClassification.from_pretrained(run.folder / "outputs" / "checkpoint").requires_grad_(False)


def tables(run: Run) -> dict[str, Rows]:
    """The run's tables, and the rows of `scores`."""
    found = {event["name"]: event["rows"] for event in events(run.folder, "table")}
    return found | {"scores": list(read_rows(run.folder / "outputs" / "scores"))}


def series(run: Run, *names: str) -> list[float]:
    """All values of these metrics, as often as they were logged."""
    logged = [event["metrics"] for event in events(run.folder, "metrics")]
    return [values[name] for name in names for values in logged if name in values]
