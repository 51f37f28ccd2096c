"""From rows to token ids (contract 4): prompt a prefix, one BOS, template applied once, one stop at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from conftest import INIT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.data.chain_sum import demonstration_rows
from stages.data.chat import encode, encode_prompt, render_prompt, stop_ids
from stages.errors import InputError
from stages.models.tokenizers import word_tokenizer

SPEC: dict[str, Any] = yaml.safe_load(INIT.read_text())["tokenizer"]
CONTROL = [*SPEC["control_tokens"], "<|end|>"]
SYSTEM, USER = {"role": "system", "content": "textbook"}, {"role": "user", "content": "12+3-9"}
SOLUTION = "<think>12+3=15;15-9=6</think><answer>6</answer>"

TURN = "{{ '<|' + m['role'] + '|>' + m['content'] }}"
EVERY = (
    "{{ bos_token }}{% for m in messages %}"
    + TURN
    + "{AFTER}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "tiny-llama's": SPEC["chat_template"],
    "a newline after EOS": EVERY.replace("{AFTER}", "{% if m['role'] == 'assistant' %}{{ eos_token + '\\n' }}{% endif %}"),
    "EOS and a newline after every turn": EVERY.replace("{AFTER}", "{{ eos_token + '\\n' }}"),
    "no EOS": EVERY.replace("{AFTER}", ""),
    "no BOS": EVERY.removeprefix("{{ bos_token }}").replace("{AFTER}", "{{ eos_token }}"),
}
END_OF_TURN = EVERY.replace("{AFTER}", "<|end|>\n")
TRIMMING = END_OF_TURN.replace("m['content']", "m['content'] | trim")
FORGETTING = END_OF_TURN.replace("m['content']", "m['content'].split('</think>')[-1]")


def tiny(template: str = SPEC["chat_template"]) -> Any:
    """A `PreTrainedTokenizerFast`; typed Any, since transformers says of an id that it may be a list or text."""
    return word_tokenizer(SPEC["task"], template, CONTROL)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def with_own_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts BOS before a text by itself, as Llama's does."""
    bos = [("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    assert tokens(tokenizer, tokenizer("12")["input_ids"]) == ["<bos>", "12"]
    return tokenizer


def test_by_hand() -> None:
    tokenizer = tiny()
    encoded = encode(tokenizer, [SYSTEM, USER], "<answer>6</answer>", stop_ids(tokenizer))
    prompt = ["<bos>", "<|system|>", "textbook", "<|user|>", "12", "+3", "-9", "<|assistant|>"]
    assert tokens(tokenizer, encoded.prompt_ids) == prompt
    assert tokens(tokenizer, encoded.completion_ids) == ["<answer>", "6", "</answer>", "<eos>"]


# What the templates write around a user's turn, before the assistant's.
AROUND = {
    "tiny-llama's": ("<bos>", ""),
    "a newline after EOS": ("<bos>", ""),
    "EOS and a newline after every turn": ("<bos>", "<eos>\n"),
    "no EOS": ("<bos>", ""),
    "no BOS": ("", "<eos>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), own_bos=st.booleans())
def test_the_template_is_applied_once(name: str, seed: int, own_bos: bool) -> None:
    tokenizer = with_own_bos(tiny(TEMPLATES[name])) if own_bos else tiny(TEMPLATES[name])
    (row,) = demonstration_rows(1, seed)
    encoded = encode(tokenizer, row["prompt"], row["completion"], stop_ids(tokenizer))
    assert encoded.prompt_ids == encode_prompt(tokenizer, row["prompt"]), "what is generated from is no prefix of this"

    before, after = AROUND[name]
    prompt = f"{before}<|user|>{row['problem']}{after}<|assistant|>"
    assert render_prompt(tokenizer, row["prompt"]) == prompt
    assert encoded.prompt_ids == ids_of(tokenizer, prompt)
    assert encoded.completion_ids == ids_of(tokenizer, row["completion"] + "<eos>")
    assert encoded.prompt_ids.count(tokenizer.bos_token_id) == (1 if before else 0)

    dialogue = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
    whole = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
    both = encoded.prompt_ids + encoded.completion_ids
    assert both[: len(whole)] == whole[: len(both)], "this is another text than the template's"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_completion_ends_with_one_stop_and_nothing_after_it(template: str) -> None:
    tokenizer = tiny(template)
    for prompt in ([USER], "12+3-9", [SYSTEM, USER, {"role": "assistant", "content": SOLUTION}, USER]):
        ids = encode(tokenizer, prompt, SOLUTION, stop_ids(tokenizer)).completion_ids
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids, "the template's newline, which no word is"
        assert ids[:-1] == ids_of(tokenizer, SOLUTION)


@pytest.mark.parametrize("completion", [SOLUTION, SOLUTION + "<eos>", SOLUTION + "<eos>12", SOLUTION + "<eos><eos>"])
@pytest.mark.parametrize("prompt", ["12+3-9", [USER]], ids=["text", "messages"])
def test_a_completion_that_brings_a_stop_gets_no_second(prompt: Any, completion: str) -> None:
    tokenizer = tiny()
    assert encode(tokenizer, prompt, completion, stop_ids(tokenizer)).completion_ids == ids_of(tokenizer, SOLUTION + "<eos>")


@pytest.mark.parametrize("template", [END_OF_TURN, TRIMMING], ids=["as it is", "trimming"])
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_the_template_s_own_end_of_turn_closes_a_completion(template: str, space: str) -> None:
    tokenizer = tiny(template)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    stops = stop_ids(tokenizer, [end, tokenizer.eos_token_id])
    encoded = encode(tokenizer, [USER], SOLUTION + space, stops)
    kept = "" if template == TRIMMING else space
    assert encoded.completion_ids == ids_of(tokenizer, f"{SOLUTION}{kept}<|end|>")
    assert encoded.prompt_ids == ids_of(tokenizer, "<bos><|user|>12+3-9<|end|>\n<|assistant|>")
    # Where the end of turn is no stop, EOS follows what the template wrote.
    assert encode(tokenizer, [USER], SOLUTION, stop_ids(tokenizer)).completion_ids[-1] == tokenizer.eos_token_id


def test_a_template_that_rewrites_the_answer_does_not_reach_it() -> None:
    tokenizer = tiny(FORGETTING)
    encoded = encode(tokenizer, [USER], SOLUTION, stop_ids(tokenizer))
    assert encoded.completion_ids == ids_of(tokenizer, SOLUTION + "<eos>")


def test_messages_need_a_template() -> None:
    tokenizer = tiny()
    tokenizer.chat_template = None
    for call in (
        lambda: encode(tokenizer, [USER], SOLUTION, [2]),
        lambda: encode_prompt(tokenizer, [USER]),
        lambda: render_prompt(tokenizer, [USER]),
    ):
        with pytest.raises(InputError, match="tokenizer has no chat template"):
            call()
    assert encode(tokenizer, "12", "3", [2]).prompt_ids == ids_of(tokenizer, "12")


def test_a_text_prompt_takes_no_template() -> None:
    tokenizer = tiny()
    encoded = encode(tokenizer, "12+3-9", SOLUTION, stop_ids(tokenizer))
    assert render_prompt(tokenizer, "12+3-9") == "12+3-9"
    assert tokens(tokenizer, encoded.prompt_ids) == ["12", "+3", "-9"]
    assert encoded.completion_ids == ids_of(tokenizer, SOLUTION + "<eos>")


@pytest.mark.parametrize("text", ["12+3-9", "<bos>12+3-9"])
def test_a_text_prompt_has_the_bos_that_its_tokenizer_adds(text: str) -> None:
    tokenizer = with_own_bos(tiny())
    for ids in (encode_prompt(tokenizer, text), encode(tokenizer, text, SOLUTION, stop_ids(tokenizer)).prompt_ids):
        assert tokens(tokenizer, ids) == ["<bos>", "12", "+3", "-9"]
    assert tokens(tokenizer, encode_prompt(tiny(), "<bos>12")) == ["<bos>", "12"]


def test_an_empty_prompt_is_bos_or_nothing() -> None:
    assert encode_prompt(tiny(), "") == []
    tokenizer = with_own_bos(tiny())
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]


@pytest.mark.parametrize("prompt", ["12+3-9", [USER], [SYSTEM, USER]], ids=["text", "chat", "system"])
def test_pad_that_is_eos_changes_nothing(prompt: Any) -> None:
    plain, same = tiny(), tiny()
    same.pad_token = same.eos_token
    assert same.pad_token_id == same.eos_token_id != plain.pad_token_id
    assert stop_ids(same) == stop_ids(plain)
    one = encode(plain, prompt, SOLUTION, stop_ids(plain))
    assert encode(same, prompt, SOLUTION, stop_ids(same)) == one
    assert one.completion_ids[-1] == same.pad_token_id


def test_no_merge_crosses_from_prompt_to_completion() -> None:
    core = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert ids_of(tokenizer, "ab") == [3]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for prompt in ("a", [{"role": "user", "content": "a"}]):
        encoded = encode(tokenizer, prompt, "b", stop_ids(tokenizer))
        assert (encoded.prompt_ids, encoded.completion_ids) == ([1], [2, 0])


def test_stops_are_eos_first_and_each_once() -> None:
    tokenizer = tiny()
    eos = tokenizer.eos_token_id
    assert stop_ids(tokenizer) == [eos]
    assert stop_ids(tokenizer, 7) == [eos, 7]
    assert stop_ids(tokenizer, [7, eos, 7, 9]) == [eos, 7, 9]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token; set eos_token in its tokenizer_config"):
        stop_ids(tokenizer)
