"""Labelling by hand on small tables of samples: pairs, rankings, many groups, and that training takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import labelling
import pytest
from labelling import (
    CONFIG,
    RANKINGS,
    Label,
    Scores,
    chain_group,
    counts,
    digest,
    group,
    metrics,
    outputs,
    pairs,
    preferences,
    rankings,
)

import stages.label
from stages.data.chat import encode
from stages.data.preferences import PreferenceTable, encode_preferences
from stages.data.recorded import RECORDED
from stages.data.schemas import row_id
from stages.models.load import load_policy
from stages.rewards import REWARDS, RewardEntry, Score, score

registered = labelling.registered
label = labelling.label


# Pairs by hand.


def test_all_pairs_with_their_margins(label: Label) -> None:
    run = label([*group("a", "1", "3", "2.5"), *group("b", "-1", "4")])
    assert pairs(preferences(run)) == [("3", "2.5", 0.5), ("3", "1", 2.0), ("2.5", "1", 1.5), ("4", "-1", 5.0)]
    assert [row["prompt"] for row in preferences(run)] == ["a", "a", "a", "b"]
    assert metrics(run) == {"rows_train": 4, "rows_heldout": 0, "ties": 0, "agreement": 1}
    assert counts(run) == {"samples without a score": 0, "pairs ordered": 4, "turned by noise": 0}
    assert outputs(run) == {"train"}


def test_a_whole_row(label: Label) -> None:
    """Canonical columns first; what belongs to one sample is left out, but for its score and how it ended."""
    rows = group("a", "1", "2", level=7)
    rows[0]["finish"] = "length"
    [row] = preferences(label(rows))
    expected = {"prompt": "a", "chosen": "2", "rejected": "1", "margin": 1.0}
    assert row == {"id": row_id(expected)} | expected | {
        "answer": "answer to a",
        "level": 7,
        "chosen_score": 2.0,
        "rejected_score": 1.0,
        "chosen_finish": "stop",
        "rejected_finish": "length",
    }
    assert list(row)[:5] == ["id", "prompt", "chosen", "rejected", "margin"]
    assert not set(row) & set(RECORDED)


def test_columns_of_the_source_give_way_to_those_of_the_preference(label: Label) -> None:
    own = {"chosen": "x", "rejected": 5, "margin": "x", "chosen_score": "x", "rejected_score": [1], "chosen_finish": 3}
    own |= {"completions": 7, "ranks": 7, "scores": 7, "finishes": 7}
    rows = [row | own for row in group("a", "1", "2")]
    plain = group("a", "1", "2")
    for config in (CONFIG, RANKINGS):
        [row], [expected] = preferences(label(rows, config)), preferences(label(plain, config))
        assert {name: row[name] for name in expected} == expected


def test_extremes_are_the_best_against_the_worst(label: Label) -> None:
    run = label([*group("a", "1", "3", "-2.5", "2"), *group("b", "5", "4"), *group("c", "7")], CONFIG | {"pairs": "extremes"})
    assert pairs(preferences(run)) == [("3", "-2.5", 5.5), ("5", "4", 1.0)]
    assert counts(run) == {"samples without a score": 0, "pairs ordered": 2, "turned by noise": 0}


def test_scores_within_a_distance_are_tied(label: Label) -> None:
    rows = [*group("a", "1", "1.5", "2"), *group("b", "1", "1.25"), *group("c", "0", "0.5625")]
    run = label(rows, CONFIG | {"tie_within": 0.5})
    assert pairs(preferences(run)) == [("2", "1", 1.0), ("0.5625", "0", 0.5625)]
    assert metrics(run) == {"rows_train": 2, "rows_heldout": 0, "ties": 3, "agreement": 1}
    assert counts(run)["pairs ordered"] == 2
    run = label(rows, CONFIG | {"tie_within": 0.5, "pairs": "extremes"})
    assert pairs(preferences(run)) == [("2", "1", 1.0), ("0.5625", "0", 0.5625)]
    assert metrics(run)["ties"] == 1
    assert metrics(label(rows))["ties"] == 0


def test_equal_scores_are_tied(label: Label) -> None:
    run = label(group("a", "1 x", "1 y", "2"))
    assert pairs(preferences(run)) == [("2", "1 x", 1.0), ("2", "1 y", 1.0)]
    assert metrics(run)["ties"] == 1


def test_equal_texts_are_tied_whatever_their_scores(label: Label) -> None:
    rows = group("a", "1", "1", "2")
    for number, row in enumerate(rows):
        row["bonus"] = float(number)
    run = label(rows, CONFIG | {"reward": {"name": "bonus"}})
    assert pairs(preferences(run)) == [("2", "1", 1.0), ("2", "1", 2.0)]
    assert metrics(run)["ties"] == 1
    run = label(rows, RANKINGS | {"reward": {"name": "bonus"}})
    assert rankings(preferences(run)) == [(["2", "1", "1"], [1, 2, 2])]


def test_ties_are_made_before_the_noise(label: Label) -> None:
    """The noise tears equal scores apart; they make no pair for all that. And it ties none that differ."""
    rows = [row for number in range(200) for row in group(f"{number}", "1 x", "1 y", "1.5")]
    run = label(rows, CONFIG | {"noise": 5, "tie_within": 0.25})
    assert metrics(run)["ties"] == 200
    assert all({row["chosen_score"], row["rejected_score"]} == {1.0, 1.5} for row in preferences(run))
    assert len(preferences(run)) == 400
    assert min(row["margin"] for row in preferences(run)) < 0.25


def test_without_a_score_nothing_is_preferred(label: Label) -> None:
    rows = [*group("a", "?", "3", "2"), *group("b", "?", "1"), *group("c", "nan", "1", "?", "0"), *group("d", "?", "?")]
    run = label(rows)
    assert pairs(preferences(run)) == [("3", "2", 1.0), ("1", "0", 1.0)]
    assert counts(run) == {"samples without a score": 6, "pairs ordered": 2, "turned by noise": 0}
    run = label(rows, RANKINGS)
    assert rankings(preferences(run)) == [(["3", "2"], [1, 2]), (["1", "0"], [1, 2])]
    assert counts(run)["samples without a score"] == 6
    run = label(rows, CONFIG | {"pairs": "extremes"})
    assert pairs(preferences(run)) == [("3", "2", 1.0), ("1", "0", 1.0)]


def test_the_reward_gets_its_arguments(label: Label) -> None:
    run = label(group("a", "1", "3"), CONFIG | {"reward": {"name": "worth", "args": {"factor": -2.0}}})
    assert pairs(preferences(run)) == [("1", "3", 4.0)]


def test_an_empty_completion_is_legal(label: Label) -> None:
    config = CONFIG | {"reward": {"name": "length"}}
    assert pairs(preferences(label(group("a", "abcd", ""), config))) == [("", "abcd", 0.004)]
    assert rankings(preferences(label(group("a", "abcd", "", ""), config | {"form": "rankings"}))) == [
        (["", "", "abcd"], [1, 1, 3])
    ]


def test_groups_are_prompts_of_one_step(label: Label) -> None:
    """Rollouts hold a prompt again and again: samples of different policies are not compared."""
    rows = [row | {"step": step} for step in (1, 2) for row in group("a", f"{step}", f"{step + 4}")]
    assert pairs(preferences(label(rows))) == [("5", "1", 4.0), ("6", "2", 4.0)]
    plain = [{name: row[name] for name in ("id", "prompt", "answer", "completion")} for row in group("a", "1", "2", "3")]
    run = label(plain)
    assert len(preferences(run)) == 3
    assert {row["chosen_finish"] for row in preferences(run)} == {row["rejected_finish"] for row in preferences(run)} == {None}
    assert preferences(label(plain, RANKINGS))[0]["finishes"] == [None] * 3


def test_scores_that_are_not_finite_are_none(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = RewardEntry("test_label:infinite", version=1)
    monkeypatch.setitem(REWARDS, "infinite", entry)
    run = label(group("a", "1", "2", "3", "4"), CONFIG | {"reward": {"name": "infinite"}})
    assert pairs(preferences(run)) == [("4", "3", 1.0)]
    assert counts(run)["samples without a score"] == 2


def infinite(completions: Sequence[str], rows: Sequence[Any]) -> list[Score | None]:
    """Not finite for 1 and 2; an int, which must not make the scores a column of ints."""
    return [Score(-math.inf if text in "12" else int(text)) for text in completions]


def test_what_was_measured_of_one_sample_is_left_behind(label: Label) -> None:
    rows = [row | {"reward": 1.0, "rewards.model": 1.0, "kl": 0.1, "advantage": 2.0} for row in group("a", "1", "2")]
    [found] = preferences(label(rows))
    assert not {"reward", "rewards.model", "kl", "advantage"} & set(found)


# Rankings by hand.


def test_rankings_share_ranks(label: Label) -> None:
    rows = [*group("a", "1 x", "3", "1 y", "2"), *group("b", "5 x", "5 y", "4"), *group("c", "0", "7"), *group("d", "2", "2 z")]
    run = label(rows, RANKINGS)
    assert rankings(preferences(run)) == [
        (["3", "2", "1 x", "1 y"], [1, 2, 3, 3]),
        (["5 x", "5 y", "4"], [1, 1, 3]),
        (["7", "0"], [1, 2]),
    ]
    assert counts(run) == {"samples without a score": 0, "ties": 3, "pairs ordered": 8, "turned by noise": 0}
    assert metrics(run) == {"rows_train": 3, "rows_heldout": 0, "ties": 3, "agreement": 1}


def test_rankings_by_hand_with_ties_within_a_distance(label: Label) -> None:
    run = label(group("a", "0", "0.5", "2", "2.25"), RANKINGS | {"tie_within": 0.5})
    assert rankings(preferences(run)) == [(["2.25", "2", "0.5", "0"], [1, 1, 3, 3])]
    assert counts(run)["pairs ordered"] == 4
    assert metrics(run)["ties"] == 2


def test_a_whole_ranking(label: Label) -> None:
    rows = group("a", "1", "2", "?", level=7)
    rows[0]["finish"] = "length"
    [row] = preferences(label(rows, RANKINGS))
    expected = {"prompt": "a", "completions": ["2", "1"], "ranks": [1, 2]}
    assert row == {"id": row_id(expected)} | expected | {
        "answer": "answer to a",
        "level": 7,
        "scores": [2.0, 1.0],
        "finishes": ["stop", "length"],
    }
    assert list(row)[:4] == ["id", "prompt", "completions", "ranks"]
    assert not set(row) & set(RECORDED)


def test_ties_that_are_not_neighbours_share_a_rank(label: Label) -> None:
    # Noise puts 1.5 between the two equal ones for some prompts; they are tied all the same.
    rows = [row for n in range(40) for row in group(f"p{n}", "1 x", "1.5", "1 y")]
    found = preferences(label(rows, RANKINGS | {"noise": 2.0}))
    assert {tuple(sorted(row["ranks"])) for row in found} == {(1, 1, 3), (1, 2, 2)}
    assert len({tuple(row["completions"]) for row in found}) > 2


# Many groups.


def test_every_group_is_labelled_alike_whatever_chunk_it_is_in(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for number in range(40) for row in group(f"{number}", *map(str, range(1 + number % 4)))]
    config = CONFIG | {"noise": 1.0}
    whole = label(rows, config)
    assert len(preferences(whole)) == 10 * (0 + 1 + 3 + 6)
    asked: list[int] = []

    def count_rows(name: str, completions: Sequence[str], *arguments: Any) -> Scores:
        asked.append(len(completions))
        return score(name, completions, *arguments)

    monkeypatch.setattr(stages.label, "score", count_rows)
    for chunk, expected in ((1024, [100]), (20, [50, 50]), (40, [100]), (1, [1, 2, 3, 4] * 10)):
        asked.clear()
        monkeypatch.setattr(stages.label, "CHUNK", chunk)
        assert digest(label(rows, config)) == digest(whole)
        assert asked == expected


# What comes of it is what training takes.


@pytest.mark.parametrize("form", ["pairs", "rankings"])
def test_labels_are_what_a_reward_model_is_trained_on(label: Label, init_folder: Path, tmp_path: Path, form: str) -> None:
    rows = chain_group("1+2", "3", "1+2=3", "")
    for row, finish, bonus_ in zip(rows, ("stop", "length", "stop"), (1.0, 3.0, 2.0), strict=True):
        row |= {"finish": finish, "bonus": bonus_}
    run = label(rows, CONFIG | {"form": form, "reward": {"name": "bonus"}})
    policy = load_policy(init_folder)
    kept = encode_preferences(tmp_path / "table", preferences(run), policy.tokenizer, policy.stops, 128)
    assert kept == {"used": 3 if form == "pairs" else 1}
    table = PreferenceTable(tmp_path / "table")
    best = table.tokens.ids(0).tolist()
    ids = encode(policy.tokenizer, rows[1]["prompt"], "1+2=3", policy.stops)
    assert best == [*ids.prompt_ids, *ids.completion_ids[:-1]]
