"""The noise of an annotator, by its frequencies: Bradley and Terry's pairs, Plackett and Luce's rankings, seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import permutations
from typing import Any

import labelling
import numpy as np
import pytest
from labelling import (
    CONFIG,
    PROMPTS,
    RANKINGS,
    Label,
    Rows,
    counts,
    digest,
    group,
    many,
    metrics,
    pairs,
    preferences,
    within,
)

import stages.rollouts.annotator
from stages.rollouts.seeds import sample_seed, uniforms

registered = labelling.registered
label = labelling.label


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
    monkeypatch.setattr(stages.rollouts.annotator, "uniforms", lambda seeds, count: np.zeros((len(seeds), count)))
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
