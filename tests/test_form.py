"""The form of an answer that reasons, by hand: what a reader is shown of it, how that ended, and what was thought."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.rewards import score
from stages.rewards.form import well_formed
from stages.rewards.text import as_shown, thinking

# completion: what is shown, what was thought.
PARTS: dict[str, tuple[str, str | None]] = {
    "<think>a</think><answer>b</answer>": ("b", "a"),
    " <think> a </think> \n <answer> b </answer> ": ("b", " a"),
    "<think>a\nb</think><answer>c\nd</answer>": ("c\nd", "a\nb"),
    # The last answer counts, also when it was not finished.
    "<answer>a</answer><answer>b</answer>": ("b", None),
    "<answer>a</answer> no, <answer>b": ("b", None),
    "<think>a</think><answer>b": ("b", "a"),
    "<answer></answer>": ("", None),
    "<answer>a</answer><think>b": ("a", "b"),
    # Without an answer's tags: what follows the thinking.
    "<think>a</think> b ": ("b", "a"),
    "<think>a</think>b</think>c": ("c", "a</think>b"),
    "<think>a</think>b<think>c</think>d": ("d", "a</think>b<think>c"),
    "a</think>b": ("b", "a"),
    # What was thought without an end is not shown.
    "<think>a": ("", "a"),
    "<think>a<answer>b</answer>": ("", "a<answer>b</answer>"),
    "<think>": ("", ""),
    " plain ": ("plain", None),
    "": ("", None),
}


@pytest.mark.parametrize(("completion", "shown", "thought"), [(text, *parts) for text, parts in PARTS.items()])
def test_parts_by_hand(completion: str, shown: str, thought: str | None) -> None:
    assert (as_shown(completion, None)[0], thinking(completion)) == (shown, thought)


TEXT = st.text(alphabet="ab \n;", min_size=1).filter(str.strip)


@given(TEXT, TEXT)
def test_what_has_the_form_comes_apart_again(thought: str, answer: str) -> None:
    completion = f"<think>{thought}</think><answer>{answer}</answer>"
    assert well_formed(completion)
    assert thinking(completion) == thought.rstrip()
    assert as_shown(completion, "length") == (answer.strip(), "stop")


@pytest.mark.parametrize(
    ("completion", "finish", "expected"),
    [
        # A whole answer ended there, also when the completion was cut off right after it.
        ("<think>a</think><answer>b</answer>", "stop", ("b", "stop")),
        ("<think>a</think><answer>b</answer>", "length", ("b", "stop")),
        ("<think>a</think><answer>b</answer> \n", "length", ("b", "stop")),
        ("<think>a</think><answer>b</answer>", None, ("b", "stop")),
        ("<think>a</think><answer>b</answer>c", "length", ("b", "stop")),
        # Else it ended as the completion did.
        ("<think>a</think><answer>b", "length", ("b", "length")),
        ("<think>a</think><answer>b", "stop", ("b", "stop")),
        ("<think>a</think>b", "length", ("b", "length")),
        ("b", None, ("b", None)),
        ("<think>a", "length", ("", "length")),
    ],
)
def test_how_it_ended_by_hand(completion: str, finish: str | None, expected: tuple[str, str | None]) -> None:
    assert as_shown(completion, finish) == expected


@pytest.mark.parametrize(
    ("completion", "formed"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n<think>a</think>\n<answer>b</answer>\n", True),
        ("<think>a</think>so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>.", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a<think>b</think><answer>c</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<answer>b</answer>", False),
        ("", False),
    ],
)
def test_the_form_by_hand(completion: str, formed: bool) -> None:
    assert well_formed(completion) is formed
    [one] = score("format", [completion], [{}])
    assert one is not None
    assert one.total == float(formed)
