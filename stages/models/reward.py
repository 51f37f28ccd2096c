"""Reward models: a causal LM's backbone with a scalar head, kept as a plain `AutoModelForSequenceClassification`.

The checkpoint gives raw scores. What the pipeline uses is `(raw + reward_bias) * reward_scale`, the two from `config.json`.

A process reward model is the same, read where a completion's steps end: sigmoid(raw) is the probability that the step is right.
Its `config.json` has `reward_step_separator`, what stood between the steps that it was trained on, and no bias or scale.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from stages.data.batching import TokenBatch, pack, pad, split_by_length
from stages.data.chat import encode, stop_ids
from stages.errors import InputError
from stages.models.backbone import hidden_states
from stages.models.load import DTYPES, LoadedModel, LoadedPolicy, is_classifier, load_policy, save_checkpoint
from stages.models.tokenizers import ensure_pad_token
from stages.specs.common import Dtype

Rates = Literal["completions", "steps"]
REFUSED: dict[Rates, str] = {
    "completions": "a process reward model, which rates the steps of a completion, where one of whole completions is needed: "
    "train one on pairs or rankings, or give this one to the reward `process_model`",
    "steps": "a reward model of whole completions, where a process reward model is needed, which rates steps: train one on "
    'rows with "completions" and "labels", or give this one to the reward `reward_model`',
}


class RewardModel(LoadedModel):
    """A sequence classifier with one label."""

    @property
    def step_separator(self) -> str | None:
        """What stood between the steps that a process model was trained on; None for a model of whole completions."""
        return getattr(self.model.config, "reward_step_separator", None)

    def rate_steps(self, separator: str) -> None:
        """Make it a process model."""
        self._forget("reward_bias", "reward_scale")
        self.model.config.reward_step_separator = separator

    @property
    def bias(self) -> float:
        return float(getattr(self.model.config, "reward_bias", 0.0))

    @property
    def scale(self) -> float:
        return float(getattr(self.model.config, "reward_scale", 1.0))

    def calibrate(self, bias: float, scale: float) -> None:
        """Set what `rewards` adds to a raw score, and then multiplies it by, of what then is a model of whole completions."""
        self._forget("reward_step_separator")
        self.model.config.reward_bias = bias
        self.model.config.reward_scale = scale

    def rewards(self, raw_B: np.ndarray) -> np.ndarray:
        """Raw scores as rewards."""
        return (raw_B + self.bias) * self.scale

    def step_scores(self, raw_N: np.ndarray) -> np.ndarray:
        """Raw scores of steps as the probabilities that they are right."""
        return torch.sigmoid(torch.from_numpy(raw_N)).numpy()

    def _forget(self, *names: str) -> None:
        for name in names:
            if hasattr(self.model.config, name):
                delattr(self.model.config, name)


class SequenceScores(nn.Module):
    """Wraps a reward model so that its forward gives raw scores; it is what `Accelerator.prepare` wraps."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, ends: Sequence[np.ndarray] | None = None) -> torch.Tensor:
        """scores_B, float32: the head at each sequence's last token, whatever token that is; or, where `ends` gives places in
        each sequence of `batch.indices`, scores_N: at these, end to end."""
        hidden_BTH = hidden_states(self.model, batch)
        hidden_NH = hidden_BTH[last_tokens(batch)] if ends is None else hidden_BTH.flatten(0, 1)[in_batch(batch, ends)]
        head: Any = self.model.score
        # Autocast would round scores to bfloat16's 8 bits, in which near pairs become ties.
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            return F.linear(hidden_NH.float(), head.weight.float()).squeeze(-1)


def last_tokens(batch: TokenBatch) -> torch.Tensor:
    """ends_BT: true where a sequence's last token is."""
    ends_BT = torch.ones_like(batch.ids_BT, dtype=torch.bool)
    if batch.attention_BT is None:
        ends_BT[:, :-1] = batch.position_ids_BT[:, 1:] == 0
        return ends_BT
    ends_BT[:, :-1] = batch.attention_BT[:, 1:] == 0
    return ends_BT & batch.attention_BT.bool()


def in_batch(batch: TokenBatch, ends: Sequence[np.ndarray]) -> torch.Tensor:
    """places_N: where these places of each sequence are among a batch's tokens, rows end to end."""
    # Padded or packed, positions restart at 0 with each sequence.
    starts_B = torch.nonzero(batch.position_ids_BT.flatten() == 0).flatten().tolist()
    found = [start + places for start, places in zip(starts_B, ends, strict=False)]
    places_N = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(places_N).to(batch.ids_BT.device)


def new_reward_model(folder: Path, seed: int) -> RewardModel:
    """A reward model to be trained: the language model in `folder` with a new head, or the reward model there as it is."""
    return (
        load_reward_model(folder, rates=None)
        if is_classifier(folder)
        else with_score_head(load_policy(folder, seed=seed), seed)
    )


def with_score_head(policy: LoadedPolicy, seed: int) -> RewardModel:
    """A reward model on a language model's own backbone, which it does not copy.

    The head's weights are drawn with deviation 1 / sqrt(hidden + 1) (Stiennon et al., arXiv 2009.01325).
    """
    config = copy.deepcopy(policy.model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(f"{config.model_type}: transformers has no sequence classifier of this family") from error
    width = _plain_head(model).in_features
    stops = list(policy.stops)
    model.config.eos_token_id = stops if len(stops) > 1 else stops[0]
    setattr(model, model.base_model_prefix, policy.model.base_model)
    head: Any = skip_init(nn.Linear, width, 1, bias=False)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    model.score = head
    return RewardModel(model, policy.tokenizer, policy.stops)


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(f"{model.config.model_type}: its classifier has no linear head `score` without a bias")
    return head


def load_reward_model(folder: Path, dtype: Dtype = "float32", rates: Rates | None = "completions") -> RewardModel:
    """Load a reward model's folder on the CPU. Raises InputError when it holds something else, or a model that rates steps
    where one of whole completions is wanted, or the other way round (`rates`; None takes either)."""
    if not is_classifier(folder):
        raise InputError(
            f"{folder.name}: not a reward model: its config.json names no ...ForSequenceClassification; "
            "give the checkpoint of a step `reward_model`"
        )
    config = json.loads((folder / "config.json").read_text())
    labels = len(config.get("id2label", {0: "", 1: ""}))
    if labels != 1:
        raise InputError(f"{folder.name}: a classifier of {labels} labels; a reward model has one, its score")
    found = "steps" if "reward_step_separator" in config else "completions"
    if rates is not None and rates != found:
        raise InputError(f"{folder.name}: {REFUSED[rates]}")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    _plain_head(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ensure_pad_token(tokenizer, model)
    model.to(dtype=DTYPES[dtype])
    return RewardModel(model, tokenizer, tuple(stop_ids(tokenizer, model.config.eos_token_id)))


def save_reward_model(reward: RewardModel, folder: Path) -> None:
    """Write a checkpoint that `AutoModelForSequenceClassification` loads."""
    # Families with absolute positions score wrongly what is padded on the left, as for generation.
    reward.tokenizer.padding_side = "right"
    save_checkpoint(reward.model, reward.tokenizer, folder)


@torch.no_grad()
def raw_scores(module: nn.Module, reward: RewardModel, sequences: Sequence[np.ndarray], max_tokens: int) -> np.ndarray:
    """raw_B, float64: the score of each sequence of token ids, in their order, in eval mode."""
    found = raw_step_scores(module, reward, sequences, [np.array([len(ids) - 1]) for ids in sequences], max_tokens)
    return np.concatenate(found) if found else np.zeros(0)


@torch.no_grad()
def raw_step_scores(
    module: nn.Module, reward: RewardModel, sequences: Sequence[np.ndarray], ends: Sequence[np.ndarray], max_tokens: int
) -> list[np.ndarray]:
    """For each sequence of token ids, float64, the scores at these places of it, in eval mode."""
    # The model's own mode: a wrapper made for this call alone would say that it trains.
    was_training = reward.model.training
    found = [np.zeros(0)] * len(sequences)
    module.eval()
    for group in split_by_length([len(ids) for ids in sequences], max_tokens):
        batch = pad([sequences[i] for i in group], [1] * len(group), reward.pad_id, tuple(group))
        asked = [ends[i] for i in group]
        scores_N: np.ndarray = module(batch.to(reward.model.device), asked).double().cpu().numpy()  # pyright: ignore[reportArgumentType]
        for i, scores in zip(group, np.split(scores_N, np.cumsum([len(one) for one in asked])[:-1]), strict=True):
            found[i] = scores
    module.train(was_training)
    return found


def score_rows(
    module: nn.Module, reward: RewardModel, rows: Sequence[dict[str, Any]], max_length: int, max_tokens: int
) -> np.ndarray:
    """raw_B of rows with `prompt`, `completion` and perhaps `finish` ("length": no EOS); NaN for those over `max_length`."""
    sequences: dict[int, np.ndarray] = {}
    for place, row in enumerate(rows):
        encoded = encode(reward.tokenizer, row["prompt"], row["completion"], reward.stops)
        completion = encoded.completion_ids[:-1] if row.get("finish") == "length" else encoded.completion_ids
        if len(encoded.prompt_ids) + len(completion) <= max_length:
            sequences[place] = np.array([*encoded.prompt_ids, *completion])
    raw_B = np.full(len(rows), np.nan)
    raw_B[list(sequences)] = raw_scores(module, reward, list(sequences.values()), max_tokens)
    return raw_B


@torch.no_grad()
def check_scores(reward: RewardModel, packed: bool) -> None:
    """Compare our scores with those of the model's own forward on two short sequences, padded and, if asked for, packed.

    Raises InputError for a family that pools otherwise, or whose attention does not keep packed sequences apart.
    """
    model, was_training = reward.model, reward.model.training
    model.eval()
    others = [token for token in range(model.config.get_text_config().vocab_size) if token != reward.pad_id][:12]
    sequences = [np.array(others[:7]), np.array(others[7:])]
    expected_B = torch.cat([model(input_ids=torch.from_numpy(ids)[None].to(model.device)).logits[:, 0] for ids in sequences])
    for build in (pad, pack) if packed else (pad,):
        batch = build(sequences, [1, 1], reward.pad_id, (0, 1)).to(model.device)  # pyright: ignore[reportArgumentType]
        error = float((SequenceScores(model)(batch) - expected_B.float()).abs().max())
        if not error <= 1e-3 * max(1.0, float(expected_B.abs().max())):
            what = "packed sequences: set runtime.packed to false" if build is pack else "scores: this family is not supported"
            raise InputError(f"{model.config.model_type}: wrong by {error:.2g} in its {what}")
    model.train(was_training)
