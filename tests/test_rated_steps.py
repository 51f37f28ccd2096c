"""At which token a step ends: against offsets, token by token, for tokens of words, of bytes and of parts of characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.data.chain_sum import worked
from stages.data.steps import last_tokens
from stages.models.tokenizers import word_tokenizer
from stages.rollouts.batch import Rollouts
from stages.rollouts.engine import Completion
from stages.rollouts.rewarded import rated_steps
from stages.rollouts.sample import Sample

EMOJI = "ab😀. é漢👩‍👦"


@cache
def words() -> PreTrainedTokenizerFast:
    """The tiny models' own: a token a word, none within a word."""
    return word_tokenizer("chain-sum", "", [])


@cache
def bytes_and_merges() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: bytes and what was merged of them, across words too. Rare characters are several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<eos>"])
    core.train_from_iterator(["1+1=2; a b é. é. ok. ok."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@cache
def characters_or_bytes() -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: characters, and bytes for those that it does not know; a space at the start is dropped."""
    known = ["<unk>", "<eos>", *"ab.1+=;▁é", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: place for place, token in enumerate([*known, "ab", "▁a", ".▁"])}
    merges = [("a", "b"), ("▁", "a"), (".", "▁")]
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


Make = Callable[[], PreTrainedTokenizerFast]
TOKENIZERS: list[Make] = [words, bytes_and_merges, characters_or_bytes]
IN_BYTES = TOKENIZERS[1:]


def sample_of(tokenizer: PreTrainedTokenizerFast, ids: list[int], stopped: bool) -> Sample:
    """A sample as `sample_rows` makes it of these tokens."""
    text: Any = tokenizer.decode(ids, skip_special_tokens=False)
    more: list[Any] = [tokenizer.eos_token_id] if stopped else []
    whole = [*ids, *more]
    return Sample({"id": "one"}, 0, [0], Completion(whole, [0.0] * len(whole), "stop" if stopped else "length"), text)


def last_places(tokenizer: PreTrainedTokenizerFast, sample: Sample, ends: Sequence[int]) -> list[int]:
    return last_tokens(tokenizer, sample.completion.ids, sample.text, ends)


def ids_of(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[int]:
    found: Any = tokenizer.convert_tokens_to_ids(tokens)
    return found


def written(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens, and by the tokenizer's own offsets, for each of its characters the last token that has a part of it."""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    places = [max(place for place, (start, end) in enumerate(offsets) if start <= one < end) for one in range(len(text))]
    return encoded["input_ids"], places


def test_the_tokenizers_are_what_they_are_meant_to_be() -> None:
    for make in IN_BYTES:
        tokenizer = make()
        pieces = tokenizer.convert_ids_to_tokens(written(tokenizer, "é. 1😀")[0])
        assert len(pieces) >= 4 + 2
        assert any(len(piece) > 1 and not piece.startswith("<0x") for piece in pieces)
    # In one of them a character's first bytes are more characters than the character.
    ids = written(characters_or_bytes(), "😀")[0]
    assert [len(str(characters_or_bytes().decode(ids[:count]))) for count in range(1, 6)] == [0, 1, 2, 3, 1]


texts = st.text(alphabet=EMOJI + "1+=;\n", min_size=1, max_size=12).filter(lambda text: not text.startswith(" "))


def ends_of(tokenizer: PreTrainedTokenizerFast, text: str, stopped: bool) -> tuple[list[int], list[int]]:
    """Where `last_tokens` finds each of a text's characters, and where it is."""
    ids, places = written(tokenizer, text)
    sample = sample_of(tokenizer, ids, stopped)
    assert sample.text == text
    # The last character's token is the last one: the EOS, where there is one.
    assert places[-1] == len(ids) - 1
    return last_places(tokenizer, sample, range(len(text))), [*places[:-1], places[-1] + stopped]


@settings(max_examples=200, deadline=None)
@given(text=texts, stopped=st.booleans())
@example(text="😀😀a", stopped=True)
def test_a_character_ends_at_the_last_of_its_tokens(text: str, stopped: bool) -> None:
    found, expected = ends_of(bytes_and_merges(), text, stopped)
    assert found == expected


@settings(max_examples=200, deadline=None)
@given(text=texts, stopped=st.booleans())
@example(text="a😀b😀.", stopped=True)
@example(text="a😀😀b", stopped=False)
def test_a_character_in_bytes_ends_at_the_last_of_them(text: str, stopped: bool) -> None:
    """Several of them in a row are decoded together only: one may be taken for a later one of them, never for an earlier."""
    found, expected = ends_of(characters_or_bytes(), text, stopped)
    in_bytes = re.compile(r"[^ab.1+=; é]+|.", re.DOTALL)
    run_ends = [run.end() - 1 for run in in_bytes.finditer(text) for _ in run[0]]
    for place, exact, end in zip(found, expected, run_ends, strict=True):
        assert exact <= place <= expected[end]
    assert found == sorted(found)


@pytest.mark.parametrize("stopped", [True, False])
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 130), min_size=1, max_size=12))
def test_a_word_s_characters_end_at_its_token(stopped: bool, ids: list[int]) -> None:
    tokenizer = words()
    lengths = [len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    places = [place for place, length in enumerate(lengths) for _ in range(length)]
    sample = sample_of(tokenizer, ids, stopped)
    expected = [len(ids) - 1 + stopped if one == len(places) - 1 else place for one, place in enumerate(places)]
    assert last_places(tokenizer, sample, range(len(places))) == expected


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), stopped=st.booleans())
def test_any_tokens_a_policy_draws_are_read_to_where_the_text_is_there(make: Make, stopped: bool, data: st.DataObject) -> None:
    """Also those that are no text: half characters, bytes in no order, tokens without a character."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(2, len(tokenizer) - 1), min_size=1, max_size=10))
    sample = sample_of(tokenizer, ids, stopped)
    ends = data.draw(st.lists(st.integers(0, len(sample.text) + 3), max_size=6).map(sorted))
    found = last_places(tokenizer, sample, ends)
    assert found == sorted(found)
    for end, place in zip(ends, found, strict=True):
        if end >= len(sample.text) - 1:
            assert place == len(sample.completion.ids) - 1
            continue
        there = [str(tokenizer.decode(ids[: count + 1])).startswith(sample.text[: end + 1]) for count in range(len(ids))]
        # The first such place, unless a byte that makes no text takes back what was there, as tokenizers with bytes may do.
        assert there[place]
        assert not (place and there[place - 1])


@pytest.mark.parametrize("stopped", [True, False])
def test_a_completion_without_text_ends_at_its_last_token(stopped: bool) -> None:
    tokenizer = characters_or_bytes()
    sample = sample_of(tokenizer, ids_of(tokenizer, ["▁"]), stopped)
    assert sample.text == ""
    assert last_places(tokenizer, sample, [0]) == [int(stopped)]
    assert last_places(tokenizer, sample, []) == []
    ended = Sample({"id": "one"}, 0, [0], Completion([1], [0.0], "stop"), "")
    assert last_places(tokenizer, ended, [0, 0]) == [0, 0]


def test_the_steps_of_a_worked_solution_by_hand() -> None:
    tokenizer = words()
    text = worked("12+3-9")
    assert text == "<think>12+3=15;15-9=6</think><answer>6</answer>"
    tokens = ["<think>", "12", "+3", "=", "15", ";", "15", "-9", "=", "6", "</think>", "<answer>", "6", "</answer>", "<eos>"]
    sample = sample_of(tokenizer, ids_of(tokenizer, tokens[:-1]), True)
    assert sample.text == text
    # The steps' last characters, in the middle of a token too; and the whole.
    ends = [text.index(";") - 2, text.index(";") - 1, text.index("</think>") - 1, len(text) - 2, len(text) - 1]
    assert [tokens[place] for place in last_places(tokenizer, sample, ends)] == [
        "15",
        "15",
        "6",
        "</answer>",
        "<eos>",
    ]
    assert last_places(tokenizer, sample, ends) == [4, 4, 9, 13, 14]


def test_steps_of_several_completions_keep_their_scores() -> None:
    tokenizer = words()
    three = ids_of(tokenizer, ["12", "+3", "="])
    rollouts = Rollouts([sample_of(tokenizer, three, stopped) for stopped in (True, True, False, False)])
    rollouts.steps = [[(1, 1.0), (3, -1.0), (3, 2.0), (4, 1.0)], [], [(0, 0.5), (9, -0.5)], []]
    assert rated_steps(tokenizer, rollouts) == (
        [[1.0, -1.0, 2.0, 1.0], [], [0.5, -0.5], []],
        [[0, 1, 1, 3], [], [0, 2], []],
    )
