"""Labels of what a reader is shown: the final answer, without the thinking before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import labelling
import pytest
from labelling import CONFIG, Label, chain_group, counts, digest, group, pairs, preferences, rankings
from test_label_learned import LEARNED, plain_rewards

from stages.errors import InputError

registered = labelling.registered
label = labelling.label
ANSWER: dict[str, Any] = CONFIG | {"part": "answer"}


def thought(thinking: str, answer: str) -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def test_the_annotator_sees_the_answer_alone(label: Label) -> None:
    """`worth` is the number that a text starts with: that of the answer, not that of the thinking; the pair holds it too."""
    rows = group("a", thought("9", "1"), thought("0", "3 b"), "<think>7</think> 2 c ", "0")
    run = label(rows, ANSWER)
    assert pairs(preferences(run))[:3] == [("3 b", "2 c", 1.0), ("3 b", "1", 2.0), ("3 b", "0", 3.0)]
    assert len(preferences(run)) == 6
    [ranking] = preferences(label(rows, ANSWER | {"form": "rankings"}))
    assert rankings([ranking]) == [(["3 b", "2 c", "1", "0"], [1, 2, 3, 4])]
    with pytest.raises(InputError, match="could not convert"):
        label(rows)
    plain = group("a", "1", "3", "2")
    assert digest(label(plain, ANSWER)) == digest(label(plain))


def test_what_shows_nothing_is_left_out_and_counted(label: Label) -> None:
    rows = group("a", thought("1", "2"), "<think>3", "", "<answer> </answer>", thought("", "1"))
    run = label(rows, ANSWER)
    assert pairs(preferences(run)) == [("2", "1", 1.0)]
    assert counts(run)["samples without an answer to show"] == 3
    with pytest.raises(InputError, match=r"no preference came of the samples \(\{'samples without an answer to show': 2"):
        label(group("a", "<think>3", "<think>4"), ANSWER)


def test_equal_answers_are_tied_whatever_was_thought(label: Label) -> None:
    rows = group("a", thought("1", "2"), thought("5", "2"), thought("1", "3"))
    assert [row["chosen"] for row in preferences(label(rows, ANSWER))] == ["3", "3"]


def test_a_whole_answer_ended_though_it_was_cut_off(label: Label) -> None:
    rows = group("a", thought("1", "2"), "<think>1</think><answer>1", thought("1", "0"), "<answer>-1")
    for row, finish in zip(rows, ("length", "length", "stop", "stop"), strict=True):
        row["finish"] = finish
    [ranking] = preferences(label(rows, ANSWER | {"form": "rankings"}))
    assert (ranking["completions"], ranking["finishes"]) == (["2", "1", "0", "-1"], ["stop", "length", "stop", "stop"])


def test_a_reward_model_reads_what_is_shown(label: Label, reward_model: Path) -> None:
    rows = chain_group("1+2", thought("1+2=3", "3"), "<think>1+2=3</think>7", "<think>5</think><answer>12")
    rows[2]["finish"] = "length"
    shown = [row | {"completion": text} for row, text in zip(rows, ("3", "7", "12"), strict=True)]
    expected = plain_rewards(reward_model, shown)
    [ranking] = preferences(label(rows, LEARNED | {"part": "answer", "form": "rankings"}, reward_model=reward_model))
    by_text = dict(zip(ranking["completions"], ranking["scores"], strict=True))
    assert by_text == pytest.approx({text: value for (text, _), value in expected.items()}, abs=1e-5)
