"""Mappings as one text: what is read from it, that every mapping survives it, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from stages.specs import Config
from stages.specs.texts import FORM, Arguments, Texts

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
ODD = ["1e-4", "1.5E3", "5", "yes", "null", "~", "", " ", "a, b", "a: b", "#x", "{x}", "[", "'", '"', "\n", "2020-01-01", "é"]


class Both(Config):
    texts: Texts = Field(default_factory=dict)
    arguments: Arguments = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", {}),
        ("  ", {}),
        (None, {}),
        ("prompt: question, completion: answer", {"prompt": "question", "completion": "answer"}),
        ("prompt: question\ncompletion: a, b", {"prompt": "question", "completion": "a, b"}),
        ("{prompt: question}", {"prompt": "question"}),
        ('{"prompt": "a, b"}', {"prompt": "a, b"}),
        ("level: 5, on: yes, none: null", {"level": "5", "on": "yes", "none": "null"}),
        ('empty: ""', {"empty": ""}),
    ],
)
def test_what_is_read_as_texts(text: str | None, read: dict[str, str]) -> None:
    assert Both.model_validate({"texts": text}).texts == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("part: answer, weight: 0.5", {"part": "answer", "weight": 0.5}),
        ("lr: 1e-4, n: 3, flag: true, none: null", {"lr": 1e-4, "n": 3, "flag": True, "none": None}),
        ('steps: ";|</think>", words: [a, b]', {"steps": ";|</think>", "words": ["a", "b"]}),
        ('text: "1e-4"', {"text": "1e-4"}),
        ("some: {thing: 1}\nother: x", {"some": {"thing": 1}, "other": "x"}),
    ],
)
def test_what_is_read_as_arguments(text: str, read: dict[str, Any]) -> None:
    assert Both.model_validate({"arguments": text}).arguments == read


@pytest.mark.parametrize("field", ["texts", "arguments"])
@pytest.mark.parametrize("text", ["a: [", "a: b: c", "- a", "[a]", "}", "a: b, {", "!!python/name:os.system x"])
def test_what_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Both.model_validate({field: text})
    (problem,) = raised.value.errors()
    assert problem["type"] in ("text_mapping", "dict_type")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question", r"'question' has no value \(a space follows the colon\); write it as `name: value, name: value`"),
        ("prompt:question", "'prompt:question' has no value"),
        ("prompt: [question]", "one text as its value"),
        ("prompt: [", "no list of names and values"),
    ],
)
def test_words_of_a_refusal(text: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Both.model_validate({"texts": text})


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text() | st.sampled_from(ODD), st.text() | st.sampled_from(ODD), max_size=4),
    st.dictionaries(st.text() | st.sampled_from(ODD), VALUES | st.sampled_from(ODD), max_size=4),
)
def test_a_form_gives_back_what_it_was_given(texts: dict[str, str], arguments: dict[str, Any]) -> None:
    config = Both(texts=texts, arguments=arguments)
    assert config.model_dump(mode="json") == {"texts": texts, "arguments": arguments}
    shown = config.model_dump(mode="json", context=FORM)
    assert all(isinstance(text, str) for text in shown.values())
    assert Both.model_validate(shown) == config
