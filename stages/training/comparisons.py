"""Comparisons as `reward_model` learns from them: pairs and rankings, whose completions are scored as wholes.

Legend: G rows, N completions of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.data.batching import TokenBatch
from stages.data.preferences import PreferenceTable, encode_preferences, preference_batches
from stages.errors import InputError
from stages.models.reward import RewardModel
from stages.objectives.reward import bradley_terry, ranking
from stages.run import Run
from stages.specs.reward_model import RewardModelConfig
from stages.statistics import by_quantile, calibration, summary

Row = dict[str, Any]


class Comparisons:
    """A tokenised dataset of pairs or rankings. Its items are rows."""

    accuracy = "pair_accuracy"

    def __init__(self, config: RewardModelConfig, path: Path) -> None:
        self.config, self.table = config, PreferenceTable(path)
        self.tokens, self.rows = self.table.tokens, self.table.rows_G

    @staticmethod
    def encode(config: RewardModelConfig, path: Path, rows: Iterable[Row], reward: RewardModel, limit: int) -> Counter[str]:
        """Write the table; see `encode_preferences`."""
        del config
        return encode_preferences(path, rows, reward.tokenizer, reward.stops, limit)

    def check_options(self) -> None:
        """Refuse options that these rows cannot serve."""
        config, table = self.config, self.table
        if (config.margin_weight or config.center_weight) and not table.paired:
            raise InputError("margin_weight and center_weight are for pairs; these rows are rankings: set both to 0")
        if config.margin_weight and np.isnan(table.margins_G).any():
            row = int(table.rows_G[np.isnan(table.margins_G)][0])
            raise InputError(f'margin_weight is set, but row {row + 1} of train has no "margin"')

    def count(self, items: np.ndarray) -> int:
        """What the loss of these rows is divided by: their number."""
        return len(items)

    def batches(self, items: np.ndarray, pad_id: int) -> Iterator[TokenBatch]:
        """Micro-batches of whole rows."""
        runtime = self.config.runtime
        return preference_batches(self.table, items, runtime.micro_batch_tokens, runtime.packed, pad_id)

    def loss(self, module: torch.nn.Module, batch: TokenBatch, total: int) -> torch.Tensor:
        """A micro-batch's share of the step's loss."""
        return preference_loss(self.config, self.table, module(batch), batch.indices, total)

    def ends(self, sequences: Sequence[int]) -> list[np.ndarray]:
        """Where each of some completions is scored: at its last token."""
        return [self.tokens.lengths[[one]] - 1 for one in sequences]

    def places(self, sequences: Sequence[int]) -> np.ndarray:
        """Where their scores are among all."""
        return np.array(sequences, dtype=np.int64)

    def metrics(self, raw_N: np.ndarray) -> dict[str, float]:
        """Loss (eq. 13, without margins) and pair accuracy, means over rows, the latter with its interval.

        A pair with equal scores is neither right nor wrong: it is left out of the accuracy; `pair_ties` is their share.
        """
        pairs = self.table.differences(raw_N)
        loss = np.mean([np.logaddexp(0.0, -one).mean() for one in pairs])
        decided = [[float(difference > 0) for difference in one if difference != 0] for one in pairs]
        differences = np.concatenate(pairs)
        accuracy = summary("pair_accuracy", [one for one in decided if one], self.config.bootstrap, self.config.seed)
        error, _ = calibration(*_choices(differences))
        ties = float((differences == 0).mean())
        return accuracy | {"heldout_loss": float(loss), "pair_ties": ties, "calibration_error": error}

    def report(self, run: Run, raw_N: np.ndarray) -> None:
        """Calibration, and accuracy by how much better the chosen is where the rows say it."""
        run.table("calibration", calibration(*_choices(np.concatenate(self.table.differences(raw_N))))[1])
        if self.table.paired and not np.isnan(self.table.margins_G).any():
            differences = np.concatenate(self.table.differences(raw_N))
            decided = differences != 0
            run.table("accuracy by margin", by_quantile(self.table.margins_G[decided], differences[decided] > 0))

    def scored(self, item: int, row: Row, reward: RewardModel, raw_N: np.ndarray) -> Row:
        """A row with its completions' rewards."""
        members = self.table.members(item)
        rewards = reward.rewards(raw_N[members.start : members.stop])
        found = {int(place): float(one) for place, one in zip(self.table.places_N[members], rewards, strict=True)}
        if "chosen" in row and "rejected" in row:
            return row | {"chosen_reward": found[0], "rejected_reward": found[1]}
        return row | {"rewards": [found.get(place) for place in range(len(row["completions"]))]}


def preference_loss(
    config: RewardModelConfig, table: PreferenceTable, scores_B: torch.Tensor, indices: Sequence[int], total: int
) -> torch.Tensor:
    """Sum over the rows of a micro-batch of each row's loss, divided by `total`, the rows of the whole step.

    Without indices (a rank that is left without rows): 0, with a gradient of zeros.
    """
    if not indices:
        return 0.0 * scores_B.sum()
    groups_B = table.groups_N[list(indices)]
    if table.paired:
        chosen_B, rejected_B = scores_B[0::2], scores_B[1::2]
        margin_B = None
        if config.margin_weight:
            margin_B = torch.from_numpy(config.margin_weight * table.margins_G[groups_B[0::2]]).to(scores_B.device)
        losses_B = bradley_terry(chosen_B, rejected_B, margin_B) + config.center_weight * (chosen_B + rejected_B) ** 2
        return losses_B.sum() / total
    ranks_B = torch.from_numpy(table.ranks_N[list(indices)]).to(scores_B.device)
    sizes: list[int] = torch.unique_consecutive(torch.from_numpy(groups_B), return_counts=True)[1].tolist()
    losses = [ranking(scores_K, ranks_K) for scores_K, ranks_K in zip(scores_B.split(sizes), ranks_B.split(sizes), strict=True)]
    return torch.stack(losses).sum() / total


def _choices(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure the model is of each pair that it decides, and whether it is right."""
    decided = differences[differences != 0]
    return 1 / (1 + np.exp(-np.abs(decided))), decided > 0
