"""Rows of `preference` that are of no use, what is said of them, and what a step's numbers say of those that are."""

from __future__ import annotations

import re
from typing import Any

import pref_bench
import pytest
import torch
from ppo_bench import events
from pref_bench import HELD, PAIRS, TRAIN, Bench, Plain, Row, Rows, by_hand, checkpoint, metrics, weights

from stages.data.batching import RowOrder
from stages.errors import InputError
from stages.request import run_stage
from stages.run import Run
from stages.specs.preference import PreferenceConfig

folders = pref_bench.folders
bench = pref_bench.bench

KTO = {"name": "kto"}


def counts(run: Run, name: str) -> dict[str, int]:
    [table] = [event["rows"] for event in events(run, "table") if event["name"] == name]
    return {row["what"]: row["rows"] for row in table}


def useless(row: Row) -> Rows:
    """Pairs that say nothing: equal, an end that makes one empty, too long."""
    equal = {"rejected": row["chosen"], "rejected_finish": row["chosen_finish"]}
    return [row | equal, row | {"rejected": "", "rejected_finish": "length"}, row | {"chosen": "1" + "+1" * 99}]


def test_useless_pairs_are_dropped_and_counted(bench: Bench) -> None:
    """They change nothing: neither which pairs a step takes nor its numbers. An end alone is a completion."""
    rows = [PAIRS[0], *useless(PAIRS[1]), *PAIRS[1:4], PAIRS[4] | {"rejected": "", "rejected_finish": "stop"}]
    run, other = bench.train(rows), bench.train([rows[0], *rows[4:]])
    assert counts(run, "train rows") == {
        "used": 5,
        "dropped: equal completions": 1,
        "completions left out: empty": 1,
        "completions left out: too long": 1,
        "dropped: fewer than two completions left": 2,
    }
    assert metrics(run) == metrics(other)


@pytest.mark.parametrize("objective", [{"name": "dpo"}, KTO, {"name": "simpo"}])
def test_segments_are_nothing_to_other_objectives(bench: Bench, objective: Row) -> None:
    """One set of pairs serves all: with segments, and with some that have none."""
    segmented = pref_bench.segmented(PAIRS)
    none = {name: None for name in segmented[0] if name.endswith(("_ends", "_scores"))}
    rows = [*segmented[:6], *(row | none for row in segmented[6:])]
    run, other = (bench.train(given[:8], given[8:], objective=objective) for given in (rows, PAIRS))
    assert metrics(run) == metrics(other)
    assert torch.equal(weights(checkpoint(run)), weights(checkpoint(other)))


def test_pairs_without_segments_are_dropped_from_2d_dpo(bench: Bench) -> None:
    none = {name: None for name in TRAIN["segments"][0] if name.endswith(("_ends", "_scores"))}
    rows = [row | (none if place == 2 else {}) for place, row in enumerate(TRAIN["segments"])]
    run, other = (bench.train(given, objective={"name": "two_d_dpo"}) for given in (rows, [*rows[:2], *rows[3:]]))
    assert counts(run, "train rows")["dropped: without segments"] == 1
    assert metrics(run) == metrics(other)


def test_useless_completions_are_left_out_of_kto(bench: Bench) -> None:
    train = pref_bench.unpaired(PAIRS[:8])
    empty, long = train[0] | {"completion": "", "finish": "length"}, train[1] | {"completion": "1" + "+1" * 99}
    run, other = (bench.train(rows, objective=KTO) for rows in ([train[0], empty, long, *train[1:]], train))
    assert counts(run, "train rows") == {
        "used": 8,
        **{"desirable": 4, "undesirable": 4},
        **{"completions left out: empty": 1, "completions left out: too long": 1},
    }
    assert metrics(run) == metrics(other)


def test_pairs_are_two_completions_for_kto(bench: Bench) -> None:
    run = bench.train(PAIRS, objective=KTO)
    assert counts(run, "train rows") == {"used": 24, "desirable": 12, "undesirable": 12}
    apart = [
        {"id": row["id"], "prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        | {"finish": row[f"{side}_finish"]}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    assert metrics(bench.train(apart, objective=KTO)) == metrics(run)


@pytest.mark.parametrize("objective", ["ipo", "dpo_nll", "orpo", "kto"])
def test_an_end_alone_behind_no_prompt_teaches_nothing(bench: Bench, objective: str) -> None:
    rows = [{"id": "none", "prompt": "", "chosen": "", "rejected": "1"}, *PAIRS[:4]]
    rows = [row | {"prompt": row["prompt"] and row["prompt"][0]["content"]} for row in rows]
    run = bench.train(rows, objective={"name": objective}, steps=1, batch_size=5)
    assert counts(run, "train rows")["used"] == (10 if objective == "kto" else 5)
    assert metrics(run)[1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("desirable", "weights", "message"),
    [
        (4, {}, None),
        (4, {"w_desirable": 1.5}, None),
        (
            4,
            {"w_desirable": 1.6},
            "4 desirable and 4 undesirable .* w_desirable from 1 to 1.5 .or w_undesirable from 1.07 to 1.6.",
        ),
        (6, {}, "6 desirable and 2 undesirable .* w_desirable from 0.333 to 0.5 .or w_undesirable from 2 to 3"),
        (6, {"w_undesirable": 2.5}, None),
        (
            2,
            {"w_desirable": 2.0},
            "2 desirable and 6 undesirable .* w_desirable from 3 to 4.5 .or w_undesirable from 0.444",
        ),
    ],
)
def test_weights_that_do_not_fit_the_numbers_are_told_of(
    bench: Bench, desirable: int, weights: dict[str, float], message: str | None
) -> None:
    rows = [row | {"label": place < desirable} for place, row in enumerate(pref_bench.unpaired(PAIRS[:8]))]
    run = bench.train(rows, steps=1, objective=KTO | weights)
    told = [event["text"] for event in events(run, "message") if "KTO" in event["text"]]
    assert [re.search(message or "", one) is not None for one in told] == ([] if message is None else [True])


@pytest.mark.parametrize(
    ("changes", "train", "held", "message"),
    [
        (
            {"objective": KTO},
            [row | {"label": True} for row in TRAIN["unpaired"]],
            HELD,
            "both classes.* 8 desirable and 0 ",
        ),
        (
            {"objective": KTO},
            [row | {"label": False} for row in TRAIN["unpaired"]],
            HELD,
            "both classes.* 0 desirable and 8 ",
        ),
        ({"objective": KTO}, [row | {"prompt": HELD[0]["prompt"]} for row in TRAIN["unpaired"]], HELD, "answer one prompt"),
        ({}, TRAIN["unpaired"], HELD, 'row 1 has neither "chosen" and "rejected"'),
        ({"objective": {"name": "two_d_dpo"}}, PAIRS, HELD, 'row 1 has no "chosen_ends"'),
        ({"objective": {"name": "two_d_dpo"}, "aspects": [1.0]}, TRAIN["segments"], HELD, "scores of 2 aspects"),
        ({}, useless(PAIRS[0])[:1], HELD, "no preference fits in 96 tokens"),
        ({}, PAIRS, useless(PAIRS[0])[:1], "no preference fits in 96 tokens"),
        ({"pairing": {"parts": 2}}, [row | {"margin": 1.0} for row in PAIRS], HELD, "equally far apart"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(bench: Bench, changes: Row, train: Rows, held: Rows, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.train(train, held, **changes)


def test_a_loss_that_is_not_finite_stops_with_its_rows(bench: Bench) -> None:
    """Counted from 1, as they are in the dataset: the second is dropped."""
    rows = [PAIRS[0], useless(PAIRS[1])[0], *PAIRS[1:5]]
    request = bench.request(rows, optimizer={"lr": 1e30, "max_grad_norm": 1e30}, runtime={"save_every": 1})
    with pytest.raises(InputError, match=r"step 2, rows \[1, 3, 4, 5, 6\] of train: (loss|grad_norm) is .*(nan|inf)"):
        run_stage(request)


# What a step says.


@pytest.mark.parametrize(
    ("objective", "means", "asks"),
    [
        ({"name": "dpo", "beta": 0.3}, False, True),
        ({"name": "ipo", "tau": 0.2}, True, True),
        ({"name": "cpo", "beta": 0.2}, False, False),
        ({"name": "simpo"}, True, False),
        ({"name": "two_d_dpo", "beta": 0.3}, False, True),
    ],
)
def test_a_step_s_implicit_rewards_are_those_before_it(bench: Bench, objective: Row, means: bool, asks: bool) -> None:
    config = PreferenceConfig.model_validate(pref_bench.merged(pref_bench.CONFIG, {"objective": objective}))
    rows = TRAIN[config.objective.feeding.form]
    logged = metrics(bench.train(rows, objective=objective, runtime={"micro_batch_tokens": 90}))
    margins = []
    for number in RowOrder(8, 0).take(0, 5):
        both = [_reward(bench, rows[number], side, config, means, asks) for side in ("chosen", "rejected")]
        margins.append(both[0] - both[1])
    assert logged[1]["train_reward_margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert logged[1]["train_margin"] == pytest.approx(sum(margins) / 5 / config.objective.scale, rel=1e-4)
    assert logged[1]["train_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 5)
    assert "train_reference_point" not in logged[1]


def _reward(bench: Bench, row: Row, side: str, config: PreferenceConfig, means: bool, asks: bool) -> float:
    policy, reference = (Plain(bench.folders[name]).of(row, side).detach() for name in ("policy", "reference"))
    ratio = policy - reference if asks else policy
    return config.objective.scale * float(ratio.mean() if means else ratio.sum())


def test_a_step_of_kto_says_its_reference_point(bench: Bench) -> None:
    objective: Row = {"name": "kto", "beta": 0.2}
    logged, rows = metrics(bench.train(TRAIN["unpaired"], objective=objective)), TRAIN["unpaired"]
    policy, reference = (Plain(bench.folders[name]) for name in ("policy", "reference"))
    taken = RowOrder(8, 0).take(0, 5).tolist()
    z = 0.2 * pref_bench._reference_point(rows, taken, policy, reference)
    assert z > 0.1
    assert logged[1]["train_reference_point"] == pytest.approx(z, rel=1e-4)
    rewards = [
        0.2 * float((policy.of(rows[n], "completion") - reference.of(rows[n], "completion")).detach().sum()) for n in taken
    ]
    right = [(reward > z) == rows[n]["label"] for reward, n in zip(rewards, taken, strict=True)]
    assert logged[1]["train_accuracy"] == pytest.approx(sum(right) / 5)
    means = [[r for r, n in zip(rewards, taken, strict=True) if rows[n]["label"] is label] for label in (True, False)]
    margin = sum(means[0]) / len(means[0]) - sum(means[1]) / len(means[1])
    assert logged[1]["train_reward_margin"] == pytest.approx(margin, rel=1e-4)


def test_epochs_say_how_many_steps(bench: Bench) -> None:
    """8 pairs, 5 a step: 2.5 epochs are 4 steps; of less than one there is one."""
    for epochs, steps in ((2.5, 4), (1.0, 2), (0.1, 1)):
        assert max(metrics(bench.train(TRAIN["pairs"], steps=None, epochs=epochs))) == steps


@pytest.mark.parametrize("pairing", [{"parts": 2, "part": 1}, {"least": 2.0}])
def test_a_curriculum_s_part_is_all_that_is_learned_from(bench: Bench, pairing: Row) -> None:
    """Margins of 0 to 3: of eight pairs the farther half are those from 2 on. All that is held out is measured."""
    far = [row for row in PAIRS[:8] if row["margin"] >= 2]
    run, other = bench.train(PAIRS[:8], pairing=pairing), bench.train(far)
    assert metrics(run) == metrics(other)
    config: Any = PreferenceConfig.model_validate(pref_bench.CONFIG)
    assert [metrics(run)[step]["loss"] for step in (1, 2, 3)] == pytest.approx(
        [one["loss"] for one in by_hand(config, far, bench.folders)[0]], rel=2e-5
    )
