"""What a reader is shown of a completion that reasons, how that ended, and what was thought, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.rewards.form import well_formed
from stages.rewards.text import as_shown, thinking

# completion: what is shown of it, whether that ended by itself however the completion did, what was thought.
PARTS: dict[str, tuple[str, bool, str | None]] = {
    "<think>a</think><answer>b</answer>": ("b", True, "a"),
    " <think> a </think> \n <answer> b </answer> \n": ("b", True, " a"),
    "<think>a\nb</think><answer>c\nd</answer>": ("c\nd", True, "a\nb"),
    # A whole answer has ended, whatever came after it.
    "<think>a</think><answer>b</answer>c": ("b", True, "a"),
    "<think>a</think><answer>b</answer> and <ans": ("b", True, "a"),
    "<think>a</think><answer></answer>": ("", True, "a"),
    "<answer>a</answer><think>b": ("a", True, "b"),
    # The last answer counts, also when it was not finished.
    "<answer>a</answer><answer>b</answer>": ("b", True, None),
    "<answer>a</answer> no, <answer>b": ("b", False, None),
    "<think>a</think><answer>b": ("b", False, "a"),
    # Without an answer's tags: what follows the thinking.
    "<think>a</think> b ": ("b", False, "a"),
    "<think>a</think>b</think>c": ("c", False, "a</think>b"),
    "<think>a</think>b<think>c</think>d": ("d", False, "a</think>b<think>c"),
    "a</think>b": ("b", False, "a"),
    "<answer>a</think>b": ("b", False, "<answer>a"),
    # What is thought without an end is not shown, nor is an answer in the middle of it.
    "<think>a": ("", False, "a"),
    "<think>": ("", False, ""),
    "<think>a<answer>b</answer>": ("", False, "a<answer>b</answer>"),
    "<think>a<answer>b</answer></think>c": ("c", False, "a<answer>b</answer>"),
    "<think>a</think>b<think>c": ("", False, "a"),
    " plain ": ("plain", False, None),
    "": ("", False, None),
}


@pytest.mark.parametrize("finish", ["stop", "length", None])
@pytest.mark.parametrize(("completion", "shown", "ended", "thought"), [(text, *parts) for text, parts in PARTS.items()])
def test_parts_by_hand(completion: str, shown: str, ended: bool, thought: str | None, finish: str | None) -> None:
    assert as_shown(completion, finish) == (shown, "stop" if ended else finish)
    assert thinking(completion) == thought


TEXT = st.text(alphabet="ab \n;", min_size=1).filter(str.strip)


@given(TEXT, TEXT)
def test_what_has_the_form_comes_apart_again(thought: str, answer: str) -> None:
    completion = f"<think>{thought}</think><answer>{answer}</answer>"
    assert well_formed(completion)
    assert thinking(completion) == thought.rstrip()
    assert as_shown(completion, "length") == (answer.strip(), "stop")
