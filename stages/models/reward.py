"""Reward models: a causal LM's backbone with a scalar head, kept as a plain `AutoModelForSequenceClassification`.

The checkpoint gives raw scores. What the pipeline uses is `(raw + reward_bias) * reward_scale`, the two from `config.json`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


class RewardModel(LoadedModel):
    """A sequence classifier with one label."""

    @property
    def bias(self) -> float:
        return float(getattr(self.model.config, "reward_bias", 0.0))

    @property
    def scale(self) -> float:
        return float(getattr(self.model.config, "reward_scale", 1.0))

    def calibrate(self, bias: float, scale: float) -> None:
        """Set what `rewards` adds to a raw score, and then multiplies it by."""
        self.model.config.reward_bias = bias
        self.model.config.reward_scale = scale

    def rewards(self, raw_B: np.ndarray) -> np.ndarray:
        """Raw scores as rewards."""
        return (raw_B + self.bias) * self.scale


class SequenceScores(nn.Module):
    """Wraps a reward model so that its forward gives raw scores; it is what `Accelerator.prepare` wraps."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """scores_B, float32: the head at each sequence's last token, whatever token that is."""
        hidden_BTH = hidden_states(self.model, batch)
        head: Any = self.model.score
        # Autocast would round scores to bfloat16's 8 bits, in which near pairs become ties.
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            return F.linear(hidden_BTH[last_tokens(batch)].float(), head.weight.float()).squeeze(-1)


def last_tokens(batch: TokenBatch) -> torch.Tensor:
    """ends_BT: true where a sequence's last token is."""
    ends_BT = torch.ones_like(batch.ids_BT, dtype=torch.bool)
    if batch.attention_BT is None:
        ends_BT[:, :-1] = batch.position_ids_BT[:, 1:] == 0
        return ends_BT
    ends_BT[:, :-1] = batch.attention_BT[:, 1:] == 0
    return ends_BT & batch.attention_BT.bool()


def new_reward_model(folder: Path, seed: int) -> RewardModel:
    """A reward model to be trained: the language model in `folder` with a new head, or the reward model there as it is."""
    return load_reward_model(folder) if is_classifier(folder) else with_score_head(load_policy(folder, seed=seed), seed)


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


def load_reward_model(folder: Path, dtype: Dtype = "float32") -> RewardModel:
    """Load a reward model's folder on the CPU. Raises InputError when it holds something else."""
    if not is_classifier(folder):
        raise InputError(
            f"{folder.name}: not a reward model: its config.json names no ...ForSequenceClassification; "
            "give the checkpoint of a step `reward_model`"
        )
    labels = len(json.loads((folder / "config.json").read_text()).get("id2label", {0: "", 1: ""}))
    if labels != 1:
        raise InputError(f"{folder.name}: a classifier of {labels} labels; a reward model has one, its score")
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
    # The model's own mode: a wrapper made for this call alone would say that it trains.
    was_training, scores_B = reward.model.training, np.zeros(len(sequences))
    module.eval()
    for group in split_by_length([len(ids) for ids in sequences], max_tokens):
        batch = pad([sequences[i] for i in group], [1] * len(group), reward.pad_id, tuple(group))
        scores_B[group] = module(batch.to(reward.model.device)).double().cpu().numpy()  # pyright: ignore[reportArgumentType]
    module.train(was_training)
    return scores_B


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
