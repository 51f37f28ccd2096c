"""A small word-level tokenizer built from a procedural task's own words, and the pad token that every policy needs."""

from __future__ import annotations

from typing import Any

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
    Uses the unknown token where there is one that differs from EOS, else adds `<|pad|>`.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            embeddings: Any = model.get_input_embeddings()
            if len(tokenizer) > embeddings.weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
