"""Rejection sampling by hand on small tables of samples: what is rejected, why, in which order, and who is asked."""

from __future__ import annotations

from typing import Any

import labelling
import pytest
import rejecting
from labelling import group
from rejecting import RIGHT, Reject, Rows, counts, made, metrics, pass_rates, texts

registered = labelling.registered
reject = rejecting.reject
BONUS: dict[str, Any] = {"name": "bonus", "minimum": 0.0}


def one(text: str = "1", **columns: Any) -> Rows:
    """A prompt's single sample, and another prompt's that is always accepted."""
    return [*(row | columns for row in group("a", text, bonus=0.0)), *group("fine", "1", bonus=0.0)]


def test_each_reason_has_its_count(reject: Reject) -> None:
    rows = [*group("a", "2", "0", "?", "1 long", "1 cut"), *group("b", "0.5", "9", "1")]
    rows[4]["finish"] = "length"
    run = reject(rows, criteria=[RIGHT | {"maximum": 8.0}], min_length=1, max_length=5)
    assert counts(run.folder) == {
        "samples": 8,
        "rejected: worth below 1": 2,
        "rejected: no verdict of worth": 1,
        "rejected: too long": 1,
        "rejected: cut off": 1,
        "rejected: worth above 8": 1,
        "doubles": 0,
        "beyond the cap": 0,
        "kept": 2,
    }
    assert texts(run) == ["2", "1"]
    assert pass_rates(run) == {"a": 1 / 5, "b": 1 / 3}
    assert metrics(run) == {"rows_train": 2, "rows_heldout": 0, "rows_prompts": 2, "accepted": 2 / 8}


# What is wrong with a sample, first to last: the reason is always the first.
WRONGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cut off": ("", {"finish": "length"}),
    "too short": ("", {"length": 2}),
    "worth below 1": ("0", {}),
    "bonus below 0": ("", {"bonus": -1.0}),
}


@pytest.mark.parametrize("first", range(4))
def test_the_reason_is_the_first_of_all(reject: Reject, first: int) -> None:
    text, columns = "1", {}
    for wrong, more in list(WRONGS.values())[first:]:
        text, columns = wrong or text, columns | more
    rows = one(text, **({"length": 3} | columns)) + group("also fine", "1", bonus=0.0)
    rows = [row | {"length": 3} if row["prompt"] != "a" else row for row in rows]
    run = reject(rows, criteria=[RIGHT, BONUS], min_length=3)
    [why] = [what for what in counts(run.folder) if what.startswith("rejected")]
    assert why == f"rejected: {list(WRONGS)[first]}"


def test_criteria_are_asked_in_their_own_order(reject: Reject) -> None:
    for criteria, why in (([RIGHT, BONUS], "worth below 1"), ([BONUS, RIGHT], "bonus below 0")):
        assert counts(reject(one("0", bonus=-1.0), criteria=criteria).folder)[f"rejected: {why}"] == 1


@pytest.mark.parametrize(
    ("bounds", "accepted"),
    [
        ({"minimum": 2.0}, ["2", "2.5", "4"]),
        ({"maximum": 2.0}, ["-1", "0", "2"]),
        ({"minimum": 0.0, "maximum": 2.0}, ["0", "2"]),
        ({"minimum": 0.0}, ["0", "2", "2.5", "4"]),
        ({"maximum": 0.0}, ["-1", "0"]),
        ({}, ["-1", "0", "2", "2.5", "4", "?"]),
    ],
)
def test_bounds_are_within(reject: Reject, bounds: dict[str, float], accepted: list[str]) -> None:
    """A criterion without a bound rejects nothing, not even what it has no verdict on."""
    rows = group("a", "-1", "0", "2", "2.5", "4", "?")
    run = reject(rows, criteria=[{"name": "worth"} | bounds], per_prompt=None)
    assert sorted(texts(run)) == sorted(accepted)
    assert pass_rates(run) == {"a": len(accepted) / 6}


def test_lengths_are_within(reject: Reject) -> None:
    rows = [row | {"length": length} for row, length in zip(group("a", *"12345"), (1, 2, 3, 4, 5), strict=True)]
    run = reject(rows, min_length=2, max_length=4, per_prompt=None)
    assert sorted(texts(run)) == ["2", "3", "4"]
    assert counts(run.folder)["rejected: too short"] == counts(run.folder)["rejected: too long"] == 1


def test_without_a_limit_samples_need_no_length_and_no_finish(reject: Reject) -> None:
    rows = [{name: row[name] for name in ("id", "prompt", "answer", "completion")} for row in group("a", "1", "2")]
    assert texts(reject(rows)) == ["2", "1"]


def test_what_was_cut_off_can_be_kept(reject: Reject) -> None:
    rows = one("2", finish="length")
    assert texts(reject(rows, complete=False)) == ["2", "1"]
    assert texts(reject(rows)) == ["1"]


def test_a_verdict_that_is_not_finite_is_none(reject: Reject) -> None:
    run = reject(group("a", "nan", "inf", "1"))
    assert counts(run.folder)["rejected: no verdict of worth"] == 2
    assert texts(run) == ["1"]


def test_a_criterion_is_asked_of_its_own_rows_alone(reject: Reject) -> None:
    """By the column's text; a row that a criterion is not for is neither rejected by it nor does it lack a verdict."""
    rows = [row | {"level": 1} for row in group("a", "5", "0", bonus=None)]
    rows += [row | {"level": 2} for row in group("b", "-5", "0", bonus=1.0)]
    criteria = [RIGHT | {"where": {"level": "1"}}, BONUS | {"where": {"level": "2"}}]
    run = reject(rows, criteria=criteria)
    assert texts(run) == ["5", "-5", "0"]
    assert [(row["rewards.worth"], row["rewards.bonus"]) for row in made(run)] == [(5.0, None), (None, 1.0), (None, 1.0)]
    assert counts(run.folder)["rejected: worth below 1"] == 1
    assert pass_rates(run) == {"a": 0.5, "b": 1.0}


def test_labels_tell_two_criteria_of_one_reward_apart(reject: Reject) -> None:
    criteria = [RIGHT | {"label": "least"}, {"name": "worth", "args": {"factor": -1.0}, "minimum": -3.0, "label": "most"}]
    run = reject(group("a", "0", "1", "3", "4"), criteria=criteria)
    assert texts(run) == ["1", "3"]
    reasons = {what: number for what, number in counts(run.folder).items() if what.startswith("rejected")}
    assert reasons == {"rejected: least below 1": 1, "rejected: most below -3": 1}
    assert [(row["rewards.least"], row["rewards.most"], row["reward"]) for row in made(run)] == [(1, -1, 0), (3, -3, 0)]


def test_a_weight_of_zero_leaves_a_criterion_its_bounds(reject: Reject) -> None:
    run = reject(group("a", "0", "1", "3"), criteria=[RIGHT | {"weight": 0.0}])
    assert texts(run) == ["1", "3"]
    assert [(row["rewards.worth"], row["reward"]) for row in made(run)] == [(1.0, 0.0), (3.0, 0.0)]
