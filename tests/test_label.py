"""Labelling by hand on small tables of samples, and the noise of an annotator by its frequencies."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import request_for
from transformers import AutoModelForSequenceClassification

import stages.label
from stages.artifacts import sha256_file
from stages.data.chat import encode
from stages.data.parquet import read_rows
from stages.data.preferences import PreferenceTable, encode_preferences
from stages.data.schemas import row_id
from stages.errors import InputError
from stages.models.load import load_policy
from stages.models.reward import load_reward_model, new_reward_model, save_reward_model, score_rows
from stages.request import run_stage
from stages.rewards import REWARDS, RewardEntry, Score, score
from stages.rollouts.sample import RECORDED
from stages.rollouts.seeds import sample_seed, uniforms
from stages.run import Run

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
Scores = list[Score | None]

# Rewards by which a table's own text says what each completion is worth. Registered below.

SCORED: list[str] = []


def worth(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], factor: float = 1.0) -> Scores:
    """The number that a completion starts with; none for a question mark, a failure for "broken"."""
    SCORED.extend(completions)
    if "broken" in completions:
        raise KeyError("no such thing")
    return [None if text.startswith("?") else Score(factor * float(text.split()[0])) for text in completions]


def bonus(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    """What the row's column says, whatever the text; none where it is null."""
    return [None if row["bonus"] is None else Score(row["bonus"]) for row in rows]


@pytest.fixture(autouse=True)
def _rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    SCORED.clear()
    for name, columns in (("worth", ("answer",)), ("bonus", ("bonus",))):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"test_label:{name}", version=1, columns=columns))


def group(prompt: str, *completions: str, **columns: Any) -> Rows:
    """Samples of one prompt, as `sample` writes them."""
    return [
        {"id": f"id of {prompt}", "prompt": prompt, "answer": f"answer to {prompt}"}
        | columns
        | {"step": 0, "sample": number, "completion": text, "length": len(text), "finish": "stop", "policy": "policy"}
        for number, text in enumerate(completions)
    ]


CONFIG: dict[str, Any] = {"reward": {"name": "worth"}, "heldout": 0, "runtime": {"device": "cpu", "threads": 1}}
RANKINGS: dict[str, Any] = CONFIG | {"form": "rankings"}


@pytest.fixture
def label(dataset: Make, tmp_path: Path) -> Callable[..., Run]:
    """Run the stage on rows, in a folder of its own each time."""
    names = map("run {}".format, count())

    def run(rows: Rows, config: dict[str, Any] = CONFIG, **inputs: Path) -> Run:
        name = next(names)
        return run_stage(request_for("label", tmp_path / name, config, samples=dataset(rows, f"samples of {name}"), **inputs))

    return run


Label = Callable[..., Run]


def preferences(run: Run, name: str = "train") -> Rows:
    return list(read_rows(run.folder / "outputs" / name))


def digest(run: Run, name: str = "train") -> str:
    return sha256_file(run.folder / "outputs" / name / "data.parquet")


def outputs(run: Run) -> set[str]:
    return set(json.loads((run.folder / "outputs.json").read_text())["outputs"])


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def metrics(run: Run) -> dict[str, float]:
    [event] = events(run, "metrics")
    assert event["step"] == 0
    return event["metrics"]


def counts(run: Run) -> dict[str, int]:
    [table] = events(run, "table")
    assert table["name"] == "preferences"
    return {row["what"]: row["number"] for row in table["rows"]}


def pairs(rows: Rows) -> list[tuple[str, str, float]]:
    return [(row["chosen"], row["rejected"], row["margin"]) for row in rows]


def rankings(rows: Rows) -> list[tuple[list[str], list[int]]]:
    return [(row["completions"], row["ranks"]) for row in rows]


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


# What is refused.


@pytest.mark.parametrize("form", ["pairs", "rankings"])
def test_one_completion_a_prompt_is_an_error_with_its_counts(label: Label, form: str) -> None:
    rows = [row for number in range(5) for row in group(f"{number}", "1" if number else "?")]
    with pytest.raises(
        InputError, match=r"no preference came of the samples \(\{'samples without a score': 1.*two completions"
    ):
        label(rows, CONFIG | {"form": form})


@pytest.mark.parametrize("form", ["pairs", "rankings"])
def test_only_ties_are_an_error_with_their_counts(label: Label, form: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no preference came of the samples \(.*'ties': 4"):
        label([*group("a", "1", "1 x", "1"), *group("b", "2", "2")], CONFIG | {"form": form})
    assert not (tmp_path / "run 0" / "outputs.json").exists()


def test_both_or_neither_of_reward_and_reward_model_is_an_error(label: Label, init_folder: Path) -> None:
    rows = group("a", "1", "2")
    for config, inputs in ((CONFIG, {"reward_model": init_folder}), (CONFIG | {"reward": None}, {})):
        with pytest.raises(InputError, match=r"either `reward` in its config or a reward model as its input, and not both"):
            label(rows, config, **inputs)
    assert SCORED == []


def test_a_missing_column_is_named_before_anything_is_scored(label: Label) -> None:
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in group("a", "1", "2")]
    with pytest.raises(InputError, match=r"reward 'worth' needs the column 'answer', which the samples does not have"):
        label(rows)
    assert SCORED == []


def test_a_reward_that_raises_names_the_row(label: Label, tmp_path: Path) -> None:
    """Also when rows before it have been labelled already."""
    rows = [row for number in range(stages.label.CHUNK) for row in group(f"{number}", "1", "2")]
    rows += [*group("fine", "1", "2"), *group("bad", "1", "broken"), *group("good", "1", "2")]
    message = r"^reward 'worth' raised KeyError on the row with id 'id of bad': 'no such thing'$"
    with pytest.raises(InputError, match=message):
        label(rows)
    assert not (tmp_path / "run 0" / "outputs.json").exists()


def test_a_policy_is_no_reward_model(label: Label, init_folder: Path) -> None:
    with pytest.raises(InputError, match="not a reward model"):
        label(group("a", "1", "2"), CONFIG | {"reward": None}, reward_model=init_folder)


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


# The noise.

PROMPTS = 3000


def many(*completions: str, prompts: int = PROMPTS) -> Rows:
    return [row for number in range(prompts) for row in group(f"{number}", *completions)]


def within(frequency: float, probability: float, number: int) -> bool:
    """Whether a frequency is within 4 standard errors of what is expected."""
    return abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / number)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def leads(rows: Rows, better: str, worse: str) -> np.ndarray:
    """By how much what the annotator saw of `better` was above that of `worse`, for each pair of the two."""
    signed = {(better, worse): 1, (worse, better): -1}
    return np.array([signed[row["chosen"], row["rejected"]] * row["margin"] for row in rows])


@pytest.mark.parametrize(("difference", "noise"), [(1.0, 1.0), (1.5, 0.5), (0.5, 2.0), (-1.0, 0.7)])
def test_pairs_follow_bradley_and_terry(label: Label, difference: float, noise: float) -> None:
    other = f"{10 + difference}"
    run = label(many("10", other), CONFIG | {"noise": noise})
    found = leads(preferences(run), other, "10")
    assert len(found) == PROMPTS
    # The lead is logistic around the difference: not its sign alone, but every quantile.
    for point in (0.0, difference, difference - noise, difference + 2 * noise):
        assert within(float((found > point).mean()), sigmoid((difference - point) / noise), PROMPTS), point
    assert all(row["margin"] >= 0 for row in preferences(run))
    right = float((found > 0).mean()) if difference > 0 else float((found < 0).mean())
    assert metrics(run)["agreement"] == pytest.approx(right)
    assert counts(run)["turned by noise"] == round((1 - right) * PROMPTS)
    assert counts(run)["pairs ordered"] == PROMPTS
    # The scores in the row are those without noise.
    assert {(row["chosen"], row["chosen_score"]) for row in preferences(run)} == {("10", 10.0), (other, float(other))}


def test_rankings_follow_plackett_and_luce(label: Label) -> None:
    scores, noise = {"1": 1.0, "1.5": 1.5, "0": 0.0}, 0.8
    run = label(many(*scores), RANKINGS | {"noise": noise})
    found = Counter(tuple(row["completions"]) for row in preferences(run))
    turned = 0
    for order in permutations(scores):
        weights = [math.exp(scores[text] / noise) for text in order]
        probability = weights[0] / sum(weights) * weights[1] / (weights[1] + weights[2])
        assert within(found[order] / PROMPTS, probability, PROMPTS), order
        turned += found[order] * sum(scores[order[a]] < scores[order[b]] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert {tuple(row["ranks"]) for row in preferences(run)} == {(1, 2, 3)}
    assert counts(run)["pairs ordered"] == 3 * PROMPTS
    assert counts(run)["turned by noise"] == turned
    assert metrics(run)["agreement"] == pytest.approx(1 - turned / (3 * PROMPTS))
    assert all(row["scores"] == [scores[text] for text in row["completions"]] for row in preferences(run))


def test_pairs_of_one_prompt_agree_with_each_other(label: Label) -> None:
    """All pairs come of one look at the completions: they are those of one order, and margins add up."""
    run, ranked, extreme = (
        label(many("1", "2", "3", prompts=200), CONFIG | {"noise": 2.0} | form)
        for form in ({}, {"form": "rankings"}, {"pairs": "extremes"})
    )
    found = preferences(run)
    orders = Counter()
    for place, ranking in enumerate(preferences(ranked)):
        (a, b, ab), (c, d, cd), (e, f, ef) = pairs(found[3 * place : 3 * place + 3])
        assert (a, b, d, f) == (c, e, f, d)
        assert cd == pytest.approx(ab + ef)
        assert ranking["completions"] == [a, b, f]
        orders[a, b, f] += 1
    assert len(orders) == 6
    assert pairs(preferences(extreme)) == pairs(found[1::3])


def test_the_labeller_s_noise_is_not_the_sampler_s(label: Label) -> None:
    """The sampler's first number, by which it drew the first token, says nothing of how the sample was labelled."""
    rows = many("1 x", "1.0001 y")
    run = label(rows, CONFIG | {"noise": 1.0, "seed": 3})
    found = leads(preferences(run), "1.0001 y", "1 x")
    seeds = np.array([sample_seed(3, 0, row["id"], row["sample"]) for row in rows], np.uint64)
    gumbel = -np.log(-np.log(uniforms(seeds, 1)[:, 0]))
    theirs = gumbel[1::2] - gumbel[::2]
    assert abs(float(np.corrcoef(found, theirs)[0, 1])) < 4 / math.sqrt(PROMPTS)
    assert not np.isclose(found, theirs, atol=1e-3).sum() > 10
    # And the two samples of a prompt have noise of their own: else no pair would ever be turned.
    assert 0.4 < metrics(run)["agreement"] < 0.6


def test_a_sample_s_noise_is_its_own(label: Label) -> None:
    """It depends on the seed, the step, the row and the number of the sample, and on no other sample."""
    rows = group("a", "1", "2", "3")
    config = CONFIG | {"noise": 1.0}

    def margin(rows: Iterable[dict[str, Any]], **changes: Any) -> float:
        [row] = [one for one in preferences(label(list(rows), config | changes)) if "1" not in (one["chosen"], one["rejected"])]
        return float(leads([row], "3", "2")[0])

    base = margin(rows)
    two = rows[1:]
    assert margin(two) == margin(reversed(two)) == base
    # The prompt, and what else the row says, have no part in it; a row that knows no step nor number is of step 0, in order.
    assert margin(row | {"prompt": "another", "answer": "another", "policy": "another"} for row in two) == base
    assert margin({name: row[name] for name in ("id", "prompt", "answer", "completion")} for row in rows) == base
    others = [
        margin(two, seed=1),
        margin(row | {"step": 1} for row in two),
        margin(row | {"sample": row["sample"] + 1} for row in two),
        margin(row | {"id": "another"} for row in two),
    ]
    assert len({base, *others}) == 5


def test_a_sample_without_a_score_leaves_the_others_noise(label: Label) -> None:
    """Where rows have no number of their own, their place in the group is it: also of those that are left out."""
    config = CONFIG | {"noise": 1.0}
    rows = [{name: value for name, value in row.items() if name != "sample"} for row in group("a", "?", "1", "2")]
    numbered = group("a", "?", "1", "2")[1:]
    assert pairs(preferences(label(rows, config))) == pairs(preferences(label(numbered, config)))


def test_the_least_number_makes_finite_noise(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number can be 0, whose logarithm is not."""
    monkeypatch.setattr(stages.label, "uniforms", lambda seeds, count: np.zeros((len(seeds), count)))
    assert pairs(preferences(label(group("a", "1", "3"), CONFIG | {"noise": 1.0}))) == [("3", "1", 2.0)]


def test_the_same_seed_gives_the_same_bytes(label: Label) -> None:
    rows = many("1", "2", prompts=200)
    one, other, changed = (label(rows, CONFIG | {"noise": 1.0, "heldout": 0.3, "seed": seed}) for seed in (0, 0, 1))
    for name in ("train", "heldout"):
        assert digest(one, name) == digest(other, name)
        assert digest(one, name) != digest(changed, name)
    chosen = [[row["chosen"] for row in preferences(run)] for run in (one, changed)]
    assert len(chosen[0]) == len(chosen[1]), "the split is not the seed's"
    assert 0.2 < np.mean([a != b for a, b in zip(*chosen, strict=True)]) < 0.6
    silent = [label(rows, CONFIG | {"seed": seed}) for seed in (0, 1)]
    assert digest(silent[0]) == digest(silent[1]), "without noise a seed changes nothing"


# What is held out.


def sides(run: Run) -> tuple[set[str], set[str]]:
    found = [
        {row["prompt"] for row in preferences(run, name)} if name in outputs(run) else set() for name in ("train", "heldout")
    ]
    return found[0], found[1]


def test_a_share_of_prompts_is_held_out(label: Label) -> None:
    rows = many("1", "2", "3", prompts=600)
    run = label(rows, CONFIG | {"heldout": 0.25})
    train, heldout = sides(run)
    assert not train & heldout
    assert len(train | heldout) == 600
    assert within(len(heldout) / 600, 0.25, 600)
    assert (metrics(run)["rows_train"], metrics(run)["rows_heldout"]) == (3 * len(train), 3 * len(heldout))
    assert outputs(run) == {"train", "heldout"}
    # A prompt keeps its side: when rows are added, in another form, with other samples, and where it comes up again.
    kept = ({*map(str, range(0, 100))} & train, {*map(str, range(0, 100))} & heldout)
    few = label(rows[:300], CONFIG | {"heldout": 0.25})
    assert sides(few) == kept
    assert sides(label(rows[:300], RANKINGS | {"heldout": 0.25, "seed": 5, "noise": 1.0})) == kept
    renamed = [row | {"id": f"another {row['id']}", "completion": f"{row['sample'] * 2}"} for row in rows[:300]]
    assert sides(label([*renamed, *rows[:300]], CONFIG | {"heldout": 0.25})) == kept
    # A larger share holds out these and more.
    assert sides(label(rows, CONFIG | {"heldout": 0.5}))[1] > heldout


def test_the_split_is_not_that_of_prepare(label: Label, dataset: Make, tmp_path: Path) -> None:
    """Samples of prompts that `prepare` has held out are split too, and so are those of the prompts that it has kept."""
    source = dataset([{"prompt": f"{number}"} for number in range(400)], "source")
    prepared = run_stage(request_for("prepare", tmp_path / "prepared", {"heldout": 0.5}, source=source))
    for name in ("train", "heldout"):
        given = [row["prompt"] for row in preferences(prepared, name)]
        assert 150 < len(given) < 250
        run = label([row for prompt in given for row in group(prompt, "1", "2")], CONFIG | {"heldout": 0.5})
        assert within(len(sides(run)[1]) / len(given), 0.5, len(given))


def test_messages_are_held_out_by_their_content(label: Label) -> None:
    rows = [
        row | {"id": f"id {number}", "prompt": [{"role": "user", "content": f"{number % 40}"}]}
        for number in range(80)
        for row in group("", "1", "2")
    ]
    run = label(rows, CONFIG | {"heldout": 0.5})
    found = [{row["prompt"][0]["content"] for row in preferences(run, name)} for name in ("train", "heldout")]
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 40
    assert min(map(len, found)) > 10


# A learned reward model.


@pytest.fixture
def reward_model(init_folder: Path, tmp_path: Path) -> Path:
    """A reward model of random weights that adds 3 to its scores, and halves and turns them: its best are its worst."""
    model = new_reward_model(init_folder, seed=1)
    model.calibrate(3.0, -0.5)
    save_reward_model(model, tmp_path / "reward model")
    return tmp_path / "reward model"


def chain_group(content: str, *completions: str) -> Rows:
    """Samples in the words of the tiny model."""
    return [row | {"prompt": [{"role": "user", "content": content}]} for row in group(content, *completions)]


LEARNED: dict[str, Any] = CONFIG | {"reward": None}


@torch.no_grad()
def plain_rewards(folder: Path, rows: Rows) -> dict[tuple[str, str], float]:
    """The oracle: transformers' own classifier on each sequence alone, (raw + 3) * -0.5."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = load_reward_model(folder)
    found = {}
    for row in rows:
        encoded = encode(loaded.tokenizer, row["prompt"], row["completion"], loaded.stops)
        ids = [*encoded.prompt_ids, *encoded.completion_ids]
        assert ids[-1] == loaded.stops[0]
        ids = ids[:-1] if row["finish"] == "length" else ids
        raw = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        found[row["completion"], row["finish"]] = (raw + 3) * -0.5
    return found


def test_a_reward_model_s_rewards_order_the_pairs(label: Label, reward_model: Path) -> None:
    texts = ["<answer>5</answer>", "", "1+2=3;3+2=5", "<think>1+2=3</think>", "7"]
    rows = [*chain_group("1+2+2", *texts), *chain_group("3+4", "8", "7", "9")]
    run = label(rows, LEARNED | {"runtime": CONFIG["runtime"] | {"micro_batch_tokens": 20}}, reward_model=reward_model)
    found = preferences(run)
    assert len(found) == 10 + 3
    expected = plain_rewards(reward_model, rows[:5]), plain_rewards(reward_model, rows[5:])
    for place, row in enumerate(found):
        rewards = expected[place >= 10]
        assert row["chosen_score"] > row["rejected_score"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == pytest.approx(rewards[row[side], "stop"], abs=1e-5)
        assert row["margin"] == row["chosen_score"] - row["rejected_score"]
    assert len({round(row["chosen_score"], 4) for row in found}) == 6
    ranked = preferences(label(rows, LEARNED | {"form": "rankings"}, reward_model=reward_model))
    for row, rewards in zip(ranked, expected, strict=True):
        assert row["completions"] == [text for text, _ in sorted(rewards, key=lambda key: -rewards[key])]


def test_truncated_samples_are_scored_without_an_end(label: Label, reward_model: Path) -> None:
    rows = chain_group("1+2", "1+2=3", "3", "1+2=", "<answer>")
    for row, finish in zip(rows, ("length", "stop", "length", "stop"), strict=True):
        row["finish"] = finish
    expected = plain_rewards(reward_model, rows)
    finishes = dict(expected.keys())
    ended = plain_rewards(reward_model, [row | {"finish": "stop"} for row in rows])
    assert abs(expected["1+2=3", "length"] - ended["1+2=3", "stop"]) > 1e-3
    found = preferences(label(rows, LEARNED, reward_model=reward_model))
    assert len(found) == 6
    for row in found:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_finish"] == finishes[row[side]]
            assert row[f"{side}_score"] == pytest.approx(expected[row[side], finishes[row[side]]], abs=1e-5)
    [ranking] = preferences(label(rows, LEARNED | {"form": "rankings"}, reward_model=reward_model))
    assert ranking["finishes"] == [finishes[text] for text in ranking["completions"]]
    assert ranking["scores"] == pytest.approx([expected[text, finishes[text]] for text in ranking["completions"]], abs=1e-5)


def test_what_does_not_fit_into_the_reward_model_has_no_score(label: Label, reward_model: Path) -> None:
    """The context is 128: prompt, completion and EOS. Without its EOS a truncated one has a token more."""
    rows = chain_group("1", *("1" + "+1" * (length - 1) for length in (124, 123, 125, 124)))
    rows[3]["finish"] = "length"
    rows[3]["completion"] = "2" + "+1" * 123
    run = label(rows, LEARNED, reward_model=reward_model)
    [row] = preferences(run)
    assert {row["chosen"], row["rejected"]} == {rows[1]["completion"], rows[3]["completion"]}
    assert counts(run)["samples without a score"] == 2


def test_a_reward_model_in_another_type(label: Label, reward_model: Path) -> None:
    rows = chain_group("1+2", "3", "1+2=3")
    exact, rough = (
        preferences(label(rows, LEARNED | {"dtype": dtype}, reward_model=reward_model))[0]["chosen_score"]
        for dtype in ("float32", "bfloat16")
    )
    assert rough == pytest.approx(exact, abs=0.05)
    assert rough != exact


def test_the_runtime_is_that_of_the_config(label: Label, reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def record(*arguments: Any) -> Any:
        limits.append(arguments[-1])
        return score_rows(*arguments)

    monkeypatch.setattr(stages.label, "score_rows", record)
    before = torch.get_num_threads()
    for threads in (2, 1):
        runtime = {"device": "cpu", "threads": threads, "micro_batch_tokens": 10 + threads}
        label(chain_group("1+2", "3", "4"), LEARNED | {"runtime": runtime}, reward_model=reward_model)
        assert torch.get_num_threads() == threads
    assert limits == [12, 11]
    torch.set_num_threads(before)


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


def test_ties_that_are_not_neighbours_share_a_rank(label: Label) -> None:
    # Noise puts 1.5 between the two equal ones for some prompts; they are tied all the same.
    rows = [row for n in range(40) for row in group(f"p{n}", "1 x", "1.5", "1 y")]
    found = preferences(label(rows, RANKINGS | {"noise": 2.0}))
    assert {tuple(sorted(row["ranks"])) for row in found} == {(1, 1, 3), (1, 2, 2)}
    assert len({tuple(row["completions"]) for row in found}) > 2


def test_scores_that_are_not_finite_are_none(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = RewardEntry("test_label:infinite", version=1)
    monkeypatch.setitem(REWARDS, "infinite", entry)
    run = label(group("a", "1", "2", "3", "4"), CONFIG | {"reward": {"name": "infinite"}})
    assert pairs(preferences(run)) == [("4", "3", 1.0)]
    assert counts(run)["samples without a score"] == 2


def infinite(completions: Sequence[str], rows: Sequence[Any]) -> list[Score | None]:
    """Not finite for 1 and 2; an int, which must not make the scores a column of ints."""
    return [Score(-math.inf if text in "12" else int(text)) for text in completions]


def test_samples_of_a_prompt_that_stand_apart_are_refused(label: Label) -> None:
    with pytest.raises(InputError, match="the samples of the prompt with id 'id of a' do not stand side by side"):
        label([*group("a", "1"), *group("b", "1", "2"), *group("a", "2")])


def test_all_held_out_says_so(label: Label) -> None:
    with pytest.raises(InputError, match="all 1 preferences were held out: lower heldout"):
        label(group("a", "1", "2"), CONFIG | {"heldout": 0.999999})


def test_samples_without_a_completion_are_refused(label: Label) -> None:
    rows = [{name: value for name, value in row.items() if name != "completion"} for row in group("a", "1", "2")]
    with pytest.raises(InputError, match='the samples have no column "completion"'):
        label(rows)


def test_what_was_measured_of_one_sample_is_left_behind(label: Label) -> None:
    rows = [row | {"reward": 1.0, "rewards.model": 1.0, "kl": 0.1, "advantage": 2.0} for row in group("a", "1", "2")]
    [found] = preferences(label(rows))
    assert not {"reward", "rewards.model", "kl", "advantage"} & set(found)
