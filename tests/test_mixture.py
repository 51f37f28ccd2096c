"""A reward of several parts: what is added up, for which rows, and what becomes of it without a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stages.errors import InputError
from stages.rewards import REWARDS
from stages.rewards.base import RewardEntry, Row, Score
from stages.rewards.mix import Mixed, Mixture, applies
from stages.specs.common import WeightedReward

CALLS: list[tuple[list[str], list[Row], dict[str, Any]]] = []
NAN, INF = math.nan, math.inf


def told(completions: Sequence[str], rows: Sequence[Row], **args: Any) -> list[Score | None]:
    """What the row says under `told`, times `factor`; notes how it was called."""
    CALLS.append((list(completions), list(rows), args))
    factor = args.get("factor", 1)
    return [None if row["told"] is None else Score(factor * row["told"]) for row in rows]


def marked(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """A score for each full stop, 1, 2, 3...; in all their sum. Steps are given from the last to the first."""
    found = [[place for place, one in enumerate(text) if one == "."][::-1] for text in completions]
    return [Score(sum(range(len(ends) + 1)), {}, list(range(len(ends), 0, -1)), ends) for ends in found]


def half(completions: Sequence[str], rows: Sequence[Row], ends: bool) -> list[Score | None]:
    """Scores of steps without their ends, or the other way round: no steps."""
    return [Score(5.0, {}, None if ends else [5.0], [0] if ends else None) for _ in completions]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    entries = {"told": (told, ("told",)), "other": (told, ("told", "kind")), "marked": (marked, ()), "half": (half, ())}
    for name, (function, columns) in entries.items():
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"{__name__}:{function.__name__}", version=1, columns=columns))


def part(name: str = "told", weight: float = 1.0, **fields: Any) -> WeightedReward:
    return WeightedReward(name=name, weight=weight, **fields)


def row(told: float | None = 1.0, **columns: Any) -> dict[str, Any]:
    return {"id": "one", "told": told} | columns


# The sum.


def test_a_reward_is_the_weighted_sum_of_its_parts() -> None:
    mixture = Mixture([part(weight=0.5), part("length", -2.0, args={"weight": 0.25}), part("marked", 3.0)])
    assert mixture.keys == ["told", "length", "marked"]
    found = mixture(["abcd", "a.b.", ""], [row(1.0), row(-3.0), row(0.0)])
    assert [one.total for one in found] == [0.5 - 2.0, -1.5 - 2.0 + 9.0, 0.0]
    assert [one.parts for one in found] == [
        {"told": 1.0, "length": 1.0, "marked": 0.0},
        {"told": -3.0, "length": 1.0, "marked": 3.0},
        {"told": 0.0, "length": 0.0, "marked": 0.0},
    ]


def test_no_completions_have_no_rewards() -> None:
    assert Mixture([part(), part("length")])([], []) == []


def test_a_part_of_weight_0_is_only_reported() -> None:
    found = Mixture([part(weight=0.0), part("marked")])(["a.", "a."], [row(7.0), row(None)])
    assert found == [
        Mixed(1.0, {"told": 7.0, "marked": 1.0}, [(1, 1.0)]),
        # Its having no verdict is nobody's business either.
        Mixed(1.0, {"told": None, "marked": 1.0}, [(1, 1.0)]),
    ]


@pytest.mark.parametrize("value", [None, NAN, INF, -INF])
def test_without_a_part_s_verdict_there_is_no_reward_but_the_other_parts_are_kept(value: float | None) -> None:
    found = Mixture([part(), part("marked", 2.0)])(["a.", "b."], [row(value), row(4.0)])
    assert found == [
        Mixed(None, {"told": None, "marked": 1.0}, []),
        Mixed(6.0, {"told": 4.0, "marked": 1.0}, [(1, 2.0), (1, 4.0)]),
    ]


def test_whole_numbers_and_truths_are_numbers() -> None:
    (found,) = Mixture([part()])(["a"], [row(True)])
    assert found == Mixed(1.0, {"told": 1.0}, [(0, 1.0)])
    assert type(found.parts["told"]) is float


# Which rows a part is for.


@pytest.mark.parametrize(
    ("where", "columns", "met"),
    [
        ({}, {}, True),
        ({"kind": "math"}, {"kind": "math"}, True),
        ({"kind": "math"}, {"kind": "Math"}, False),
        ({"kind": "math"}, {"kind": " math"}, False),
        ({"kind": "3"}, {"kind": 3}, True),
        ({"kind": "3"}, {"kind": 3.0}, False),
        ({"kind": "3.0"}, {"kind": 3.0}, True),
        ({"kind": "True"}, {"kind": True}, True),
        ({"kind": "true"}, {"kind": True}, False),
        ({"kind": "None"}, {"kind": None}, True),
        ({"kind": ""}, {"kind": None}, False),
        ({"kind": ""}, {"kind": ""}, True),
        ({"kind": "math", "told": "1.0"}, {"kind": "math"}, True),
        ({"kind": "math", "told": "2.0"}, {"kind": "math"}, False),
        ({"kind": "code", "told": "1.0"}, {"kind": "math"}, False),
    ],
)
def test_a_part_is_for_the_rows_whose_columns_as_text_are_what_it_says(
    where: dict[str, str], columns: dict[str, Any], met: bool
) -> None:
    assert applies(part(where=where), row(**columns)) is met


def test_a_part_is_asked_for_its_own_rows_only_and_absent_from_the_others() -> None:
    mixture = Mixture(
        [part(where={"kind": "math"}), part(label="again", weight=10.0, where={"kind": "chat"}), part("length", 1.0)]
    )
    rows = [row(1.0, kind="chat"), row(2.0, kind="math"), row(3.0, kind="chat"), row(4.0, kind="else")]
    found = mixture(["a", "bb", "ccc", "dddd"], rows)
    assert [(texts, asked) for texts, asked, _ in CALLS] == [(["bb"], [rows[1]]), (["a", "ccc"], [rows[0], rows[2]])]
    weight = -0.001
    assert [one.parts for one in found] == [
        {"again": 1.0, "length": weight},
        {"told": 2.0, "length": 2 * weight},
        {"again": 3.0, "length": 3 * weight},
        {"length": 4 * weight},
    ]
    assert [one.total for one in found] == [10 + weight, 2 + 2 * weight, 30 + 3 * weight, 4 * weight]


def test_a_part_for_no_row_is_not_asked() -> None:
    assert Mixture([part(where={"kind": "math"}), part("marked")])(["."], [row(kind="chat")])[0].parts == {"marked": 1.0}
    assert CALLS == []


# What a part is given.


def test_arguments_and_what_is_given_by_name_are_passed() -> None:
    model = object()
    parts = [part(args={"factor": 2}), part(label="thrice", args={"factor": 3}), part("other", args={"factor": 5})]
    found = Mixture(parts, {"told": {"model": model}, "marked": {"never": "asked for"}})(["a"], [row(1.0)])
    assert [args for _, _, args in CALLS] == [{"factor": 2, "model": model}, {"factor": 3, "model": model}, {"factor": 5}]
    assert found == [Mixed(10.0, {"told": 2.0, "thrice": 3.0, "other": 5.0}, [(0, 2.0), (0, 3.0), (0, 5.0)])]


def test_one_reward_several_times_is_told_apart_by_labels() -> None:
    mixture = Mixture([part("length", 1.0), part("length", 1.0, label="long", args={"weight": 2.0})])
    assert mixture.keys == ["length", "long"]
    (found,) = mixture(["ab"], [row()])
    assert found.parts == {"length": -0.002, "long": 4.0}
    assert found.total == -0.002 + 4.0


def test_a_part_that_raises_names_the_row() -> None:
    with pytest.raises(InputError, match="reward 'told' raised KeyError on the row with id 'two'"):
        Mixture([part("length"), part()])(["a", "b"], [row(), {"id": "two"}])


# Steps.


def test_steps_of_all_parts_are_weighted_and_in_order() -> None:
    found = Mixture([part(weight=0.5), part("marked", -2.0), part("marked", 10.0, label="too")])(
        ["a.bc.d", "", "x"], [row(3.0)] * 3
    )
    # A part without steps rates the last character; what ends at one character is in order of its score.
    assert found[0].steps == [(1, -2.0), (1, 10.0), (4, -4.0), (4, 20.0), (5, 1.5)]
    assert [one.steps for one in found[1:]] == [[(0, 1.5)], [(0, 1.5)]]
    assert sum(score for _, score in found[0].steps) == found[0].total == 1.5 + 8 * 3


@pytest.mark.parametrize("ends", [True, False])
def test_scores_of_steps_without_ends_are_no_steps(ends: bool) -> None:
    assert Mixture([part("half", 2.0, args={"ends": ends})])(["abc"], [row()])[0].steps == [(2, 10.0)]


def test_parts_that_are_only_reported_or_do_not_apply_rate_no_step() -> None:
    mixture = Mixture([part("marked", 0.0), part("marked", 1.0, label="chat", where={"kind": "chat"}), part()])
    assert mixture(["a.b"], [row(3.0, kind="math")])[0].steps == [(2, 3.0)]


# What is refused before anything is sampled.


def test_columns_that_a_part_reads_or_chooses_by_must_be_there() -> None:
    mixture = Mixture([part("marked"), part("other"), part("length", where={"level": "3", "kind": "math"})])
    mixture.check(["id", "told", "kind", "level"], "the prompts")
    # However the columns come.
    mixture.check(iter(["level", "kind", "told"]), "the prompts")
    with pytest.raises(
        InputError, match=r"reward 'other' needs the column 'kind', which is not in the prompts \(columns: told"
    ):
        mixture.check(["told", "level"], "the prompts")
    message = r"reward 'length' is for rows by the column 'level', which is not in data/2 \(columns: told, kind\)"
    with pytest.raises(InputError, match=message):
        mixture.check(iter(["told", "kind"]), "data/2")
    labelled = Mixture([part("length", label="brief", where={"level": "3"})])
    with pytest.raises(InputError, match="reward 'brief' is for rows by the column 'level'"):
        labelled.check(["told"], "data/2")


@pytest.mark.parametrize(
    "parts",
    [
        [part("length", where={"kind": "math"})],
        [part("length", where={"kind": "math"}), part("format", 1.0, where={"kind": "code"})],
        # What is only reported rates nothing.
        [part("length", where={"kind": "math"}), part("format", 0.0)],
        [part("format", 0.0)],
    ],
)
def test_a_row_that_nobody_rates_is_refused(parts: list[WeightedReward]) -> None:
    with pytest.raises(InputError, match=r"prompts row 7: no reward is for it; give one without `where`.*`prepare`"):
        Mixture(parts).check_row(row(kind="chat"), "prompts row 7")
    Mixture([*parts, part("length", -0.5, where={"kind": "chat"}, label="more")]).check_row(row(kind="chat"), "prompts row 7")


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_what_a_part_needs_of_it_is_refused(value: Any, weight: float) -> None:
    mixture = Mixture([part("length"), part("other", weight, where={"kind": "math"}, label="label")])
    with pytest.raises(InputError, match=r"prompts row 2: \"told\" is empty, and the reward 'other' needs it"):
        mixture.check_row(row(value, kind="math"), "prompts row 2")
    # The part is not for this one; an empty column that nobody needs; numbers that are nothing are something.
    mixture.check_row(row(value, kind="chat"), "prompts row 2")
    mixture.check_row(row(0, kind="math", note=""), "prompts row 2")
    mixture.check_row(row(False, kind="math"), "prompts row 2")
