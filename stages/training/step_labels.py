"""Labelled steps as `reward_model` learns from them. Its score of a step is the logit of its being right (Lightman et al.,
arXiv 2305.20050; Math-Shepherd, arXiv 2312.08935).

Legend: B rows, N steps of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.data.batching import TokenBatch, micro_batches
from stages.data.step_labels import StepTable, encode_step_labels
from stages.errors import InputError
from stages.models.reward import RewardModel
from stages.objectives.reward import step_loss
from stages.run import Run
from stages.specs.reward_model import RewardModelConfig
from stages.statistics import calibration, summary

Row = dict[str, Any]


class StepLabels:
    """A tokenised dataset of completions whose steps are labelled. Its items are rows."""

    accuracy = "step_accuracy"

    def __init__(self, config: RewardModelConfig, path: Path) -> None:
        self.config, self.table = config, StepTable(path)
        self.tokens, self.rows = self.table.tokens, self.table.tokens.rows

    @staticmethod
    def encode(config: RewardModelConfig, path: Path, rows: Iterable[Row], reward: RewardModel, limit: int) -> Counter[str]:
        """Write the table; see `encode_step_labels`."""
        return encode_step_labels(path, rows, reward.tokenizer, reward.stops, limit, config.step_separator)

    def check_options(self) -> None:
        """Refuse options that these rows cannot serve."""
        if self.config.margin_weight or self.config.center_weight:
            raise InputError("margin_weight and center_weight are for pairs; these rows label steps: set both to 0")

    def count(self, items: np.ndarray) -> int:
        """What the loss of these rows is divided by: the number of their steps."""
        return sum(len(self.table.steps(int(item))) for item in items)

    def batches(self, items: np.ndarray, pad_id: int) -> Iterator[TokenBatch]:
        """Micro-batches of rows."""
        runtime = self.config.runtime
        return micro_batches(self.tokens, items, "all", runtime.micro_batch_tokens, runtime.packed, pad_id)

    def loss(self, module: torch.nn.Module, batch: TokenBatch, total: int) -> torch.Tensor:
        """A micro-batch's share of the step's loss."""
        labels_N = torch.from_numpy(self.table.labels_N[self.table.places(batch.indices)]).to(batch.ids_BT.device)
        return step_loss(module(batch, self.ends(batch.indices)), labels_N, total)

    def ends(self, sequences: Sequence[int]) -> list[np.ndarray]:
        """Where each of some rows is scored: where its steps end."""
        return self.table.ends(sequences)

    def places(self, sequences: Sequence[int]) -> np.ndarray:
        """Where their scores are among all."""
        return self.table.places(sequences)

    def metrics(self, raw_N: np.ndarray) -> dict[str, float]:
        """The loss, a mean over steps, and accuracies, means over rows of the mean over a row's steps.

        A step is called right above a probability of one half. One labelled with exactly one half is neither right nor wrong:
        it enters the loss alone. `first_wrong_found` is the share, of rows with a wrong step, of those in which the first one
        that the model calls wrong is the first that is; `all_right_found`, of rows without one, of those in which it calls none
        wrong; `first_wrong_f1` their harmonic mean (ProcessBench, arXiv 2412.06559).
        """
        labels_N, config = self.table.labels_N.astype(np.float64), self.config
        loss = np.logaddexp(0.0, raw_N) - labels_N * raw_N
        hits_N, decided_N = (raw_N > 0) == (labels_N > 0.5), labels_N != 0.5
        sides = {"": decided_N, "_right": labels_N > 0.5, "_wrong": labels_N < 0.5}
        found = {"heldout_loss": float(loss.mean()), "calibration_error": calibration(*self._choices(raw_N))[0]}
        for name, side_N in sides.items():
            rows = [hits_N[self.table.steps(b)][side_N[self.table.steps(b)]] for b in range(len(self.table))]
            found |= summary(f"step_accuracy{name}", [row.tolist() for row in rows if len(row)], config.bootstrap, config.seed)
        return found | self._first_wrong(raw_N)

    def _first_wrong(self, raw_N: np.ndarray) -> dict[str, float]:
        found: dict[str, list[list[float]]] = {"first_wrong_found": [], "all_right_found": []}
        for item in range(len(self.table)):
            steps = self.table.steps(item)
            first, called = _first(self.table.labels_N[steps] < 0.5), _first(raw_N[steps] <= 0)
            found["all_right_found" if first is None else "first_wrong_found"].append([float(called == first)])
        shares: dict[str, float] = {}
        for name, rows in found.items():
            shares |= summary(name, rows, self.config.bootstrap, self.config.seed)
        if all(found.values()):
            both = [shares[name] for name in found]
            shares["first_wrong_f1"] = 2 * both[0] * both[1] / sum(both) if any(both) else 0.0
        return shares

    def _choices(self, raw_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How sure the model is of what it calls each step that is right or wrong, and whether it is so."""
        decided_N = self.table.labels_N != 0.5
        raw_N, right_N = raw_N[decided_N], self.table.labels_N[decided_N] > 0.5
        return 1 / (1 + np.exp(-np.abs(raw_N))), (raw_N > 0) == right_N

    def report(self, run: Run, raw_N: np.ndarray) -> None:
        """Calibration of the probabilities."""
        run.table("calibration", calibration(*self._choices(raw_N), what="steps")[1])

    def scored(self, item: int, row: Row, reward: RewardModel, raw_N: np.ndarray) -> Row:
        """A row with the probabilities that its steps are right."""
        return row | {"step_scores": reward.step_scores(raw_N[self.table.steps(item)]).tolist()}


def _first(wrong: np.ndarray) -> int | None:
    places = np.flatnonzero(wrong)
    return int(places[0]) if len(places) else None
