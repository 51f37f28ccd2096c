"""Slices of the endless stream of prompts: which prompts, in which order, each once before any comes again."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import numbered, prepare, prompts, write_source

from stages.artifacts import read_manifest
from stages.data.parquet import write_rows
from stages.data.slices import permutation, taken
from stages.errors import InputError
from stages.specs.prepare import Slice

NAMES = st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=30)


def cut(start: int, count: int, seed: int = 0) -> Slice:
    return Slice(seed=seed, start=start, count=count)


def test_the_order_is_that_of_hashes_of_seed_pass_and_prompt() -> None:
    names = {"a", "b", "c", "d"}

    def digest(number: int, name: str) -> str:
        return hashlib.sha256(f"7/{number}/{name}".encode()).hexdigest()

    assert permutation(names, 7, 2) == sorted(names, key=lambda name: digest(2, name))
    assert taken(names, cut(1, 2, seed=7)) == sorted(names, key=lambda name: digest(0, name))[1:3]
    assert taken(names, cut(4, 4, seed=7)) == sorted(names, key=lambda name: digest(1, name))


@given(NAMES, st.integers(0, 3), st.lists(st.integers(1, 8), min_size=1, max_size=20))
def test_slices_end_to_end_repeat_nothing_before_all_came(names: set[str], seed: int, counts: list[int]) -> None:
    counts = [min(count, len(names)) for count in counts]
    start, stream = 0, list[str]()
    for count in counts:
        part = taken(names, cut(start, count, seed))
        assert len(part) == len(set(part))
        # What a slice over the end of a pass leaves out, it has already.
        whole = [permutation(names, seed, place // len(names))[place % len(names)] for place in range(start, start + count)]
        assert part == list(dict.fromkeys(whole))
        stream += whole
        start += count
    for number in range(0, len(stream), len(names)):
        a_pass = stream[number : number + len(names)]
        assert len(set(a_pass)) == len(a_pass)


@given(NAMES, st.integers(0, 3))
def test_passes_and_seeds_have_orders_of_their_own(names: set[str], seed: int) -> None:
    orders = [permutation(names, seed, number) for number in range(12)] + [permutation(names, seed + 1, 0)]
    assert all(sorted(order) == sorted(names) for order in orders)
    if len(names) > 4:
        assert any(one != other for one, other in pairwise(orders))


def test_a_slice_of_more_than_there_are_is_refused() -> None:
    assert len(taken({"a", "b"}, cut(5, 2))) in (1, 2)
    with pytest.raises(InputError, match=r"slice\.count asks for 3 prompts and there are 2 for training"):
        taken({"a", "b"}, cut(0, 3))


def sliced(folder: Path, source: Any, start: int, count: int, **more: Any) -> list[Any]:
    return prompts(prepare(folder, source, slice={"seed": 1, "start": start, "count": count}, **more).train)


def test_the_stage_takes_training_prompts_in_the_streams_order(tmp_path: Path) -> None:
    rows = numbered(40)
    whole = prepare(tmp_path / "whole", rows, heldout=0.25)
    parts = [sliced(tmp_path / str(start), rows, start, 5, heldout=0.25) for start in range(0, 20, 5)]
    got = [prompt for part in parts for prompt in part]
    assert len(set(got)) == 20
    assert set(got) <= set(prompts(whole.train))
    hashed = {hashlib.sha256(json.dumps(prompt).encode()).hexdigest(): prompt for prompt in prompts(whole.train)}
    assert got == [hashed[one] for one in permutation(hashed.keys(), 1, 0)][:20]


def test_the_order_of_the_file_changes_no_byte(tmp_path: Path) -> None:
    rows = numbered(30)
    one = prepare(tmp_path / "one", rows, slice={"start": 3, "count": 9})
    other = prepare(tmp_path / "other", rows[::-1], slice={"start": 3, "count": 9})
    first, second = (read_manifest(made.folder / "outputs" / "train", "dataset").digest for made in (one, other))
    assert first == second
    assert one.counts["outside the slice"] == 21
    assert one.metrics["rows_train"] == 9


def test_all_rows_of_a_prompt_come_with_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 4}", "completion": str(n)} for n in range(12)]
    made = prepare(tmp_path, rows, slice={"count": 2})
    assert len(made.train) == 6
    assert len(set(prompts(made.train))) == 2
    assert prompts(made.train) == [prompt for prompt in dict.fromkeys(prompts(made.train)) for _ in range(3)]


def test_what_is_excluded_is_not_in_the_stream(tmp_path: Path) -> None:
    rows = numbered(12)
    excluded = write_source(tmp_path / "excluded", [])
    (excluded / "rows.jsonl").unlink()
    write_rows(excluded, [{"id": str(n), "prompt": row["prompt"]} for n, row in enumerate(rows[:6])])
    made = prepare(tmp_path / "made", rows, exclude=excluded, slice={"count": 6})
    assert set(prompts(made.train)) == set(prompts(rows[6:]))
    with pytest.raises(InputError, match="asks for 7 prompts and there are 6"):
        prepare(tmp_path / "more", rows, exclude=excluded, slice={"count": 7})


def test_empty_completions_are_kept_where_asked(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "good", "rejected": ""}]
    with pytest.raises(InputError, match='"rejected" is empty'):
        prepare(tmp_path / "refused", rows)
    made = prepare(tmp_path / "kept", rows, keep_empty=True)
    assert [(row["chosen"], row["rejected"]) for row in made.train] == [("good", "")]
    with pytest.raises(InputError, match='"rejected" must be text, it is NoneType'):
        prepare(tmp_path / "typed", [{"prompt": "p", "chosen": "good", "rejected": None}], keep_empty=True)
