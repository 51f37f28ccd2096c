"""From rows to token ids: the chat template applied once, one BOS, the prompt always a token prefix of prompt + completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.errors import InputError

Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """A prompt and its completion, the latter closed by an end-of-sequence token."""

    prompt_ids: list[int]
    completion_ids: list[int]


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None = None) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS first, then those of the generation config."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError("the model's tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
    more = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
    return list(dict.fromkeys([eos, *more]))


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The prompt's text as the model sees it: messages through the chat template, text as it is."""
    if isinstance(prompt, str):
        return prompt
    return str(_template(tokenizer, prompt, add_generation_prompt=True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with BOS exactly once where the tokenizer has one.

    A template that writes BOS itself is not given another; a text prompt gets the BOS that the tokenizer adds by itself, or
    nothing when it adds none.
    """
    text = render_prompt(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    if not isinstance(prompt, str):
        return _ids(tokenizer, text)
    whole: Any = tokenizer(text, add_special_tokens=True)["input_ids"]
    without = _ids(tokenizer, text)
    if isinstance(bos, int) and whole[:1] == [bos] and without[:1] != [bos]:
        return [bos, *without]
    return without


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str, stops: Sequence[int]) -> Encoded:
    """Tokenise a prompt and its completion, which is closed by exactly one of the `stops` (see `stop_ids`).

    For messages the completion is what the template writes after the prompt for an assistant's turn, up to and with its
    end-of-turn token; what a template writes after that (a newline, say) is left out. Prompt and completion are tokenised
    apart, as in generation, so that no merge crosses the border.
    """
    text = completion
    if isinstance(prompt, str):
        prompt_ids = encode_prompt(tokenizer, prompt)
    else:
        before = render_prompt(tokenizer, prompt)
        prompt_ids = _ids(tokenizer, before)
        whole = str(_template(tokenizer, [*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False))
        # Templates that rewrite the answer (dropping a thinking part, say) have no common prefix: then the text itself is used.
        if whole.startswith(before) and completion.strip() in whole[len(before) :]:
            text = whole[len(before) :]
    ids = _ids(tokenizer, text)
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Encoded(prompt_ids, [*ids, stops[0]] if end is None else ids[: end + 1])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> Any:
    if tokenizer.chat_template is None:
        raise InputError(
            "the rows' prompts are messages, but the model's tokenizer has no chat template: "
            "use a chat model, or prepare the rows with text prompts"
        )
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
