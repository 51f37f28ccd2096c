"""A small word-level tokenizer built from a procedural task's own words, and the pad token that every policy needs."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.data import chain_sum
from stages.errors import InputError

WORDS = {"chain-sum": (chain_sum.words, chain_sum.TOKEN_PATTERN)}
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


def word_tokenizer(task: str, chat_template: str, extra: list[str]) -> PreTrainedTokenizerFast:
    """A `PreTrainedTokenizerFast` whose words are those of a procedural task; `extra` are control tokens such as roles."""
    if task not in WORDS:
        raise InputError(f"tokenizer: no task is named {task!r}; there are {', '.join(WORDS)}")
    words, pattern = WORDS[task]
    specials = [PAD, BOS, EOS, UNK, *extra]
    vocabulary = {word: place for place, word in enumerate([*specials, *words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(specials)
    arguments: dict[str, Any] = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **arguments)
    tokenizer.chat_template = chat_template
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give a tokenizer a pad token that is not EOS, and the model a row for it.

    Classification heads of transformers pool before the first pad, so pad == EOS would hide the EOS from a reward model.
    Uses the unknown token where there is one that differs from EOS, else adds `<|pad|>`. Padding is masked wherever it stands,
    so no row of the embedding is kept from learning: transformers does that to the source's pad, which may be the EOS.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            _grow(model, len(tokenizer))
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None
    model.config.pad_token_id = tokenizer.pad_token_id
    # A classifier has none.
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def _grow(model: PreTrainedModel, size: int) -> None:
    """Give the model `size` rows of vocabulary. New rows are the mean of the old ones, which bounds what they take from
    them: a mean logit has at most the mean probability, so log-probs fall by less than 1 / V."""
    embeddings: Any = model.get_input_embeddings()
    old = embeddings.num_embeddings
    if size <= old:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in layer.parameters() if layer is not None else ():
            rows[old:] = rows[:old].mean(0)
