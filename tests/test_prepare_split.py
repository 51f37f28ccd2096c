"""The split: it stays, and held-out prompts are kept out of training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import FIXED, Row, numbered, prepare, prepared, prompts

from stages.errors import InputError

SOME_ROWS = st.lists(
    st.fixed_dictionaries({"prompt": st.sampled_from("abcdefgh"), "completion": st.sampled_from("xy")}), max_size=8
)


def test_without_a_share_all_rows_are_for_training(tmp_path: Path) -> None:
    made = prepare(tmp_path, FIXED)
    assert [{name: row[name] for name in ("prompt", "completion")} for row in made.train] == FIXED
    assert made.heldout == []
    assert (made.counts, made.metrics) == ({"read": 12, "training": 12}, {"rows_train": 12.0, "rows_heldout": 0.0})
    assert json.loads((tmp_path / "run" / "outputs.json").read_text())["outputs"] == {"train": "dataset"}


def test_the_share_is_about_what_was_asked_for(tmp_path: Path) -> None:
    made = prepare(tmp_path, numbered(2000), heldout=0.25)
    assert abs(len(made.heldout) / 2000 - 0.25) < 0.04  # four standard errors
    assert len(made.train) + len(made.heldout) == 2000
    assert made.metrics == {"rows_train": len(made.train), "rows_heldout": len(made.heldout)}
    assert json.loads((tmp_path / "run" / "outputs.json").read_text())["outputs"] == {"train": "dataset", "heldout": "dataset"}


@settings(max_examples=30, deadline=None)
@given(SOME_ROWS, SOME_ROWS, SOME_ROWS)
def test_adding_rows_never_moves_an_old_row(before: list[Row], old: list[Row], after: list[Row]) -> None:
    with prepared([*FIXED, *old], heldout=0.4) as first, prepared([*before, *old, *FIXED, *after], heldout=0.4) as second:
        for side in ("train", "heldout"):
            assert {row["id"] for row in getattr(first, side)} <= {row["id"] for row in getattr(second, side)}
        assert not {row["id"] for row in second.train} & {row["id"] for row in second.heldout}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"prompt": st.sampled_from("abcdef"), "problem": st.integers(0, 5)}), max_size=12),
    st.none() | st.integers(1, 3),
)
def test_heldout_prompts_are_never_in_train(rows: list[Row], max_heldout: int | None) -> None:
    """The split is by another column than the prompt, so that prompts do collide across it."""
    rows = [*rows, *({"prompt": f"fixed {n}", "problem": 10 + n} for n in range(12))]
    config: dict[str, Any] = {"heldout": 0.5, "split_by": "problem", "deduplicate": False}
    with prepared(rows, **config) as made, prepared(rows, **config, max_heldout=max_heldout) as limited:
        assert not set(prompts(made.train)) & set(prompts(made.heldout))
        problems = {row["problem"] for row in made.heldout}
        assert Counter((row["prompt"], row["problem"]) for row in made.heldout) == Counter(
            (row["prompt"], row["problem"]) for row in rows if row["problem"] in problems
        )
        kept = [row for row in rows if row["problem"] not in problems and row["prompt"] not in prompts(made.heldout)]
        assert [(row["prompt"], row["problem"]) for row in made.train] == [(row["prompt"], row["problem"]) for row in kept]
        removed = len(rows) - len(made.heldout) - len(kept)
        assert made.counts.get("removed from training: prompt is held out", 0) == removed
        assert limited.train == made.train, "a prompt held out beyond the limit came back into training"
        assert limited.heldout == made.heldout[:max_heldout]


def test_the_split_is_the_same_whatever_stands_beside_the_prompt(tmp_path: Path) -> None:
    questions = [{"question": f"prompt {n}", "answer": str(n)} for n in range(40)]
    one = prepare(tmp_path / "one", numbered(40), heldout=0.5)
    two = prepare(tmp_path / "two", questions, heldout=0.5, columns={"prompt": "question"})
    assert prompts(one.heldout) == prompts(two.heldout) != []
    assert prompts(one.train) == prompts(two.train) != []


def test_split_by_keeps_rows_together_and_must_exist(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {n}", "completion": "c", "topic": n % 10} for n in range(60)]
    made = prepare(tmp_path, rows, heldout=0.4, split_by="topic")
    topics = [{row["topic"] for row in side} for side in (made.train, made.heldout)]
    assert all(topics)
    assert not topics[0] & topics[1]
    with pytest.raises(InputError, match='`split_by` names the column "group"; the rows have id, prompt, completion, topic'):
        prepare(tmp_path / "other", rows, heldout=0.4, split_by="group")


def test_max_heldout_keeps_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    all_of_them = prepare(tmp_path / "all", numbered(60), heldout=0.5)
    made = prepare(tmp_path / "some", numbered(60), heldout=0.5, max_heldout=7)
    assert made.heldout == all_of_them.heldout[:7]
    assert made.train == all_of_them.train
    left_out = len(all_of_them.heldout) - 7
    assert left_out > 0
    assert made.counts["held out beyond max_heldout, left out"] == left_out
    assert made.counts["held out"] == 7


@pytest.mark.parametrize("chat", [False, True])
def test_exclude_removes_prompts_from_training(tmp_path: Path, dataset: Callable[..., Path], chat: bool) -> None:
    unwanted = [f"prompt {n}" for n in (0, 5, 99)]
    exclude = dataset([{"prompt": [{"role": "user", "content": text}] if chat else text} for text in unwanted])
    made = prepare(tmp_path, FIXED, exclude, chat=chat, system="s" if chat else None)
    assert len(made.train) == (12 if chat else 10), "a system message makes another prompt"
    made = prepare(tmp_path / "again", FIXED, exclude, chat=chat)
    assert [row["completion"] for row in made.train] == [f"completion {n}" for n in range(12) if n not in (0, 5)]
    assert made.counts == {"read": 12, "training": 10, "removed from training: prompt is held out": 2}


def test_exclude_leaves_the_heldout_rows(tmp_path: Path, dataset: Callable[..., Path]) -> None:
    alone = prepare(tmp_path / "alone", FIXED, heldout=0.5)
    exclude = dataset([{"prompt": prompts(alone.heldout)[0]}, {"prompt": prompts(alone.train)[0]}])
    made = prepare(tmp_path / "excluding", FIXED, exclude, heldout=0.5)
    assert made.heldout == alone.heldout
    assert made.train == alone.train[1:]
