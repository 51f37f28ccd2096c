"""Where the steps of a text end, and the tokens at which those of an encoded completion do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rated_steps import bytes_and_merges, characters_or_bytes, words, written
from transformers import PreTrainedTokenizerFast

from stages.data.chat import encode
from stages.data.steps import last_tokens_of_encoded, pieces, step_ends

# Each step with a | behind it.
ENDS: dict[str, tuple[str, str]] = {
    "one separator": ("\n", "a\n|b\n|c|"),
    "the last step ends with one": ("\n", "a\n|b\n|"),
    "blank pieces join the step before": ("\n", "a\n\n|b\n \n\t\n|c|"),
    "blank pieces at the end": ("\n", "a\n|b\n\n |"),
    "blank pieces at the start join the step after": ("\n", "\n \na\n|b|"),
    "no separator": ("\n", "a b|"),
    "no text": ("\n", "|"),
    "nothing but white space": ("\n", " \n\n |"),
    "a regular expression": (";|</think>", "<think>1;|2</think>|3|"),
    "a sentence, its space looked ahead at": (r"\.(?=\s)", "It is 3.5.| So 4.|"),
    "an empty match behind a sign": (r"(?<=;)", "a;|b|"),
    "an empty match at the start": (r"^|;", "a;|b|"),
    "a match over the line": (r"\n\n", "a\nb\n\n|c|"),
}


@pytest.mark.parametrize(("pattern", "marked"), ENDS.values(), ids=ENDS)
def test_where_steps_end(pattern: str, marked: str) -> None:
    steps = marked.split("|")[:-1]
    text, found = "".join(steps), step_ends("".join(steps), pattern)
    assert pieces(text, found) == steps
    assert found == [max(0, sum(map(len, steps[: k + 1])) - 1) for k in range(len(steps))]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab; \n", max_size=12), pattern=st.sampled_from([";", "\n", "(?:;)+", r"(?<=a)", "a|;"]))
def test_steps_are_the_whole_text_and_never_blank(text: str, pattern: str) -> None:
    ends = step_ends(text, pattern)
    steps = pieces(text, ends)
    assert "".join(steps) == text
    assert len(steps) == len(ends)
    if text.strip():
        assert all(step.strip() for step in steps)
        # Nothing but a match, and the end of the text, ends a step.
        matched = {match.end() - 1 for match in re.finditer(pattern, text)}
        blank = {end for end in range(len(text)) if not text[end].strip()}
        assert set(ends) - matched - blank <= {len(text) - 1}
        # A match is skipped only where nothing but white space stands behind it, or before it.
        for end in matched - set(ends) - {-1}:
            later = min(one for one in ends if one > end)
            between = [one for one in sorted(matched) if end < one <= later] or [later]
            assert not text[end + 1 : between[0] + 1].strip() or not text[: end + 1].strip()
    else:
        assert ends == [max(0, len(text) - 1)]


def test_what_is_left_over_belongs_to_the_last_piece() -> None:
    assert pieces("ab;cd;ef", [2, 5]) == ["ab;", "cd;ef"]


# Encoded completions.


@cache
def templated(template: str) -> PreTrainedTokenizerFast:
    tokenizer = bytes_and_merges()
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    return tokenizer


TEMPLATES = {
    "the text alone": "{{ m['content'] }}",
    "text around it": "{{ '>> ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}{{ ' <eos>' if m['role'] != 'user' }}",
    "its white space taken off": "{{ m['content'] | trim }}<eos>\n",
}


@pytest.mark.parametrize("text", ["é. ok; 1+1=2", " é. ok\n", "\n\nab", "1;1;1"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_template_may_put_something_around_the_text(template: str, text: str, stopped: bool) -> None:
    tokenizer = templated(template)
    eos: Any = tokenizer.eos_token_id
    ids = encode(tokenizer, [{"role": "user", "content": "q"}], text, [eos]).completion_ids
    ids = ids if stopped else ids[:-1]
    found = last_tokens_of_encoded(tokenizer, ids, stopped, text, range(len(text)))
    assert found is not None
    assert found[-1] == len(ids) - 1
    # What is last when white space is taken off ends at the last token too.
    for end, place in enumerate(found[: len(text.rstrip()) - 1]):
        if text[: end + 1].strip():
            # The first token up to which this much of the text is there.
            assert text[: end + 1].lstrip() in str(tokenizer.decode(ids[: place + 1]))
            assert text[: end + 1].lstrip() not in str(tokenizer.decode(ids[:place]))


Make = Callable[[], PreTrainedTokenizerFast]


@pytest.mark.parametrize("make", [words, bytes_and_merges, characters_or_bytes])
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from(["1+1=2", "1;", "ab", ".", "=", "+1=+2"]), min_size=1, max_size=5), stopped=st.booleans())
def test_a_step_s_token_is_the_last_with_a_part_of_it_by_the_tokenizer_s_offsets(
    make: Make, steps: list[str], stopped: bool
) -> None:
    tokenizer, text = make(), ";".join(steps)
    ids, places = written(tokenizer, text)
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        return  # a word tokenizer's unknown words
    eos: Any = tokenizer.eos_token_id
    ends = [len(";".join(steps[: k + 1])) for k in range(len(steps) - 1)] + [len(text) - 1]
    found = last_tokens_of_encoded(tokenizer, [*ids, eos] if stopped else ids, stopped, text, ends)
    assert found == [*(places[end] for end in ends[:-1]), len(ids) - 1 + stopped]


def test_tokens_that_spell_another_text_have_no_places() -> None:
    tokenizer = words()
    ids: Any = tokenizer("1+1=hello", add_special_tokens=False)["input_ids"]
    assert last_tokens_of_encoded(tokenizer, ids, False, "1+1=hello", [3]) is None
    assert last_tokens_of_encoded(tokenizer, ids[:2], False, "1+1", [0, 2]) == [0, 1]
