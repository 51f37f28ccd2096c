"""Pairs with the segments of their completions: by hand, the same pairs as without, and that 2D-DPO's table takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import labelling
import pyarrow as pa
import pytest
from labelling import CONFIG, Label, Rows, Scores, chain_group, counts, digest, group, metrics, pairs, preferences
from pydantic import ValidationError
from test_segments import STOPS, WORDS, ids

from stages.data.parquet import read_schema
from stages.data.schemas import SEGMENTS, canonical
from stages.data.segments import SegmentTable, encode_segments
from stages.errors import InputError
from stages.rewards import REWARDS, RewardEntry, Score
from stages.specs.label import LabelConfig

registered = labelling.registered
label = labelling.label


def digits(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], lower: float | str = 0.0) -> Scores:
    """The sum of the digits before each `;`; a step ends with these, rated in tenths. No verdict for a question mark, and no
    steps where there is an exclamation mark."""
    found: Scores = []
    for text in completions:
        ends = [end for end, letter in enumerate(text) if letter == ";"]
        scores = [int(text[end - 1]) / 10 - float(lower) for end in ends]
        rated = (None, None) if "!" in text else (scores, ends)
        found.append(None if "?" in text else Score(float(sum(int(text[end - 1]) for end in ends)), {}, *rated))
    return found


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "digits", RewardEntry(f"{__name__}:digits", version=1))


PAIRS: dict[str, Any] = CONFIG | {"reward": {"name": "digits"}}
WITH: dict[str, Any] = PAIRS | {"segments": True}
EMPTY = dict.fromkeys(SEGMENTS)


def segments(rows: Rows) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in SEGMENTS) for row in rows]


def table(path: Path, rows: Rows) -> tuple[SegmentTable, Counter[str]]:
    found = encode_segments(path, rows, WORDS, STOPS, 100)
    return SegmentTable(path), found


# By hand.


def test_both_completions_have_their_steps_and_the_scores_of_these(label: Label) -> None:
    """The text behind the last rated step is its own, as it is with `form: steps`."""
    run = label([*group("a", "a1;b5;", "c9;"), *group("b", "x0;", "y1;z2; and what is left")], WITH)
    assert pairs(preferences(run)) == [("c9;", "a1;b5;", 3.0), ("y1;z2; and what is left", "x0;", 3.0)]
    assert segments(preferences(run)) == [([2], [0.9], [2, 5], [0.1, 0.5]), ([2, 22], [0.1, 0.2], [2], [0.0])]
    assert counts(run) == {
        **{"samples without a score": 0, "pairs ordered": 2, "turned by noise": 0},
        "pairs without segments": 0,
    }


def test_the_answer_alone_has_the_steps_that_are_in_it(label: Label) -> None:
    rows = group("a", "<think>a9;b9;</think>c1;d2;", "<think>e9;</think>f0;")
    assert segments(preferences(label(rows, WITH | {"part": "answer"}))) == [([2, 5], [0.1, 0.2], [2], [0.0])]


@pytest.mark.parametrize("which", ["all", "extremes"])
def test_the_pairs_are_those_without_segments(label: Label, which: str) -> None:
    """Their ids, noise and held-out prompts too; a completion without rated steps is still preferred, and ties are ties."""
    rows = [
        row
        for number in range(40)
        for row in group(f"{number}", "a1;", "b2;c3;", "!d4;", "?", "e1;", "e1;", "", finish="stop", level=number)
    ]
    how = {"pairs": which, "noise": 2.0, "tie_within": 0.5, "heldout": 0.3, "seed": 5}
    plain, run = label(rows, PAIRS | how), label(rows, WITH | how)
    assert metrics(plain) == metrics(run)
    assert counts(run).items() >= counts(plain).items()
    for name in ("train", "heldout"):
        known, found = preferences(plain, name), preferences(run, name)
        assert [{column: value for column, value in row.items() if column not in SEGMENTS} for row in found] == known
        for row in found:
            unrated = any(text.startswith("!") or not text for text in (row["chosen"], row["rejected"]))
            assert [row[column] is None for column in SEGMENTS] == [unrated] * 4
    assert counts(run)["pairs without segments"] > 0
    # Nothing about segments is in what is written without them.
    schema = read_schema(plain.folder / "outputs" / "train")
    assert not set(SEGMENTS) & set(schema.names)
    types = {field.name: field.type for field in read_schema(run.folder / "outputs" / "train")}
    assert {name: types[name] for name in SEGMENTS} == {
        **{"chosen_ends": pa.list_(pa.int64()), "chosen_scores": pa.list_(pa.float64())},
        **{"rejected_ends": pa.list_(pa.int64()), "rejected_scores": pa.list_(pa.float64())},
    }


def test_columns_have_their_types_though_a_part_has_no_segments(label: Label) -> None:
    rows = [row for number in range(60) for row in group(f"{number}", "!1;", "a2;")]
    held = {row["prompt"] for row in preferences(label(rows, PAIRS | {"heldout": 0.3}), "heldout")}
    rows = [row | ({} if row["prompt"] in held else {"completion": row["completion"].removeprefix("!")}) for row in rows]
    run = label(rows, WITH | {"heldout": 0.3})
    assert {segments([row])[0] for row in preferences(run, "heldout")} == {(None,) * 4}
    schemas = [read_schema(run.folder / "outputs" / name) for name in ("train", "heldout")]
    assert schemas[0].equals(schemas[1])


def test_the_same_config_makes_the_same_bytes(label: Label) -> None:
    rows = [row for number in range(20) for row in group(f"{number}", "a1;b2;", "c4;", "!d5;")]
    once, again = (label(rows, WITH | {"noise": 1.0}) for _ in range(2))
    assert digest(once) == digest(again)


# What cannot work.


def test_a_reward_that_rates_no_steps_is_refused(label: Label) -> None:
    with pytest.raises(InputError, match=r"no pair has segments \(.*without segments': 1\}\): does the reward rate steps\?"):
        label(group("a", "1", "2"), CONFIG | {"segments": True})


@pytest.mark.parametrize(
    ("lower", "message"),
    [
        (0.2, r"steps of a pair of the row with id 'id of a': \"rejected_scores\" are .* that of segment 1 is -0.1"),
        ("inf", r"\"chosen_scores\" are numbers from 0 up, .* that of segment 1 is -inf"),
    ],
)
def test_scores_that_cannot_weigh_are_refused(label: Label, lower: float | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label(group("a", "a1;", "b5;"), WITH | {"reward": {"name": "digits", "args": {"lower": lower}}})


def backwards(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    return [Score(float(text), {}, [1.0, 1.0, 1.0], [2, 1, 3]) for text in completions]


def test_steps_that_do_not_follow_each_other_are_refused(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "backwards", RewardEntry(f"{__name__}:backwards", version=1))
    with pytest.raises(InputError, match="row with id 'id of a': \"chosen_ends\" must rise"):
        label(group("a", "1000", "2000"), WITH | {"reward": {"name": "backwards"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "rankings"}, "segments are those of pairs: they need `form: pairs` and a `reward` that rates steps"),
        ({"form": "steps"}, "segments are those of pairs"),
        ({"reward": None}, "segments are those of pairs"),
    ],
)
def test_what_has_no_segments_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelConfig.model_validate(WITH | changes)


# What learns from them.


def test_the_quickstart_s_pairs_become_segments_of_tokens(label: Label, tmp_path: Path) -> None:
    steps = ["<think>12+3=15;", "15-9=6</think>", "<answer>6</answer>"]
    wrong = ["<think>12+3=14;", "14-9=5</think>", "<answer>5</answer>"]
    rows = chain_group("12+3-9", "".join(wrong), "".join(steps), "<answer>6</answer>")
    rows = [row | {"problem": "12+3-9", "answer": "6"} for row in rows]
    # What was cut off before its answer has one step less.
    rows[0] |= {"completion": "".join(wrong[:2]), "finish": "length"}
    run = label(rows, WITH | {"reward": {"name": "chain_sum"}})
    found, of_tokens = table(tmp_path / "table", preferences(run))
    assert [row["rejected"] for row in preferences(run)] == ["".join(wrong[:2]), "<answer>6</answer>"]
    lengths = [len(ids(text)) for text in steps]
    lengths[-1] += 1
    assert [found.segments(sequence) for sequence in range(4)] == [lengths, lengths[:2], lengths, [len(ids(steps[2])) + 1]]
    assert found.pairing(0) == ([0, 1], [0, 1], [1.0, 1.0], [0.0, 0.0])
    assert found.pairing(1) == ([0], [0], [1.0], [0.0])
    assert of_tokens == {"used": 2, "segments": 9}


def test_pairs_without_segments_are_left_out_of_two_d_dpo(label: Label, tmp_path: Path) -> None:
    rows = chain_group("1", "1+1;", "!5;", "2;")
    rows = preferences(label(rows, WITH))
    assert len(rows) == 3
    found, of_tokens = table(tmp_path / "table", rows)
    assert of_tokens == {"used": 1, "segments": 2, "dropped: without segments": 2}
    assert found.rows_I.tolist() == [number for number, row in enumerate(rows) if row["chosen_ends"] is not None]
    with pytest.raises(InputError, match=r"no pair with segments fits .*'dropped: without segments': 3"):
        table(tmp_path / "none", [row | EMPTY for row in rows])
    # One column that lacks is an error: it was to be there.
    with pytest.raises(InputError, match='row 1 has no "chosen_scores"'):
        table(tmp_path / "part", [rows[0] | {"chosen_ends": [0], "chosen_scores": None}])


def test_what_label_wrote_can_be_prepared_again(label: Label) -> None:
    for row in preferences(label(chain_group("1", "1+1;", "!5;", "2;"), WITH)):
        again = canonical(row, "row 1")
        assert {name: again.get(name) for name in SEGMENTS} == {name: row[name] for name in SEGMENTS}
