"""What GRPO samples: the curriculum's prompts, others in the place of groups without spread, prompts that do not fit."""

from __future__ import annotations

from typing import Any

import grpo_bench
import pytest
from grpo_bench import PROMPTS, Bench, by_hand
from ppo_bench import Folders, close, events, folder, metrics, records, series

from stages.errors import InputError
from stages.models.load import load_policy, save_checkpoint

folders = grpo_bench.folders
bench = grpo_bench.bench
rewards_of_tests = grpo_bench.rewards_of_tests

# Groups of `chat` prompts have spread; of `sum` prompts, which no random policy solves, none.
PARTS = [{"name": "length", "weight": 50.0, "where": {"kind": "chat"}}, {"name": "answer", "where": {"kind": "sum"}}]


def in_order(bench: Bench, kinds: str) -> dict[str, Any]:
    """Prompts of these kinds (c: chat, s: sum) that are drawn in this order, the first one again after the last."""
    names = {"c": "chat", "s": "sum"}
    rows = [
        row | {"kind": names[kind], "pass_rate": place / 10}
        for place, (row, kind) in enumerate(zip(PROMPTS, kinds, strict=False))
    ]
    inputs = {"prompts": folder(bench.path / kinds, rows)}
    return {"inputs": inputs, "rewards": PARTS, "curriculum": {"order": "rising"}, "optimizer": {"lr": 1e-6}}


@pytest.fixture
def drawn(bench: Bench) -> list[tuple[int, list[int]]]:
    """The step and the prompts, by place, of each round of sampling."""
    found: list[tuple[int, list[int]]] = []
    places = {row["id"]: place for place, row in enumerate(PROMPTS)}
    bench.spy("collect", after=lambda _, *given: found.append((given[5], [places[row["id"]] for row in given[2]])))
    return found


FIRST = [(0, [0, 1, 2, 3]), (0, [4, 5, 6]), (0, [7])]
AGAIN = [(step, places) for step in (1, 2) for places in ([8, 0, 1, 2], [3, 4, 5], [6, 7])]
ROUNDS: dict[int, list[tuple[int, list[int]]]] = {
    0: [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [8, 0, 1, 2])],
    1: [*FIRST[:2], (1, [7, 8, 0, 1]), (1, [2, 3]), (2, [4, 5, 6, 7]), (2, [8])],
    2: [*FIRST, *AGAIN],
    # After three rounds all groups that are wanted have spread: no other prompts are drawn.
    9: [*FIRST, *AGAIN],
}


@pytest.mark.parametrize("rounds", ROUNDS)
def test_other_prompts_take_the_place_of_groups_without_spread(
    bench: Bench, drawn: list[tuple[int, list[int]]], rounds: int
) -> None:
    kinds = "scsscsccs"
    run = bench.train(steps=3, refill={"rounds": rounds}, **in_order(bench, kinds))
    assert drawn == ROUNDS[rounds]
    steps = [[place for at, places in drawn if at == step for place in places] for step in range(3)]
    assert series(run, "groups") == [len(places) for places in steps]
    assert series(run, "groups_without_spread") == [sum(kinds[place] == "s" for place in places) for places in steps]
    # What was drawn is in the dataset, with what is known of it, also where it teaches nothing.
    ids = [PROMPTS[place]["id"] for places in steps for place in places for _ in range(4)]
    assert [row["id"] for row in records(run)] == ids
    assert all(row["reward"] is not None for row in records(run))
    for step, update in enumerate(bench.updates):
        taught = {bench.moments[step].rollouts.samples[index].row["kind"] for index in update.chosen}
        assert taught == {"chat"}


def test_a_prompt_that_comes_again_joins_its_group(bench: Bench, drawn: list[tuple[int, list[int]]]) -> None:
    run = bench.train(steps=2, prompts=3, refill={"rounds": 2}, reference_kl={"measure": False}, **in_order(bench, "cs"))
    # Two in the first round, and once more: of two groups, one has spread, where three are wanted.
    assert drawn == [(0, [0, 1, 0]), (0, [1, 0]), (0, [1, 0]), (1, [1, 0, 1]), (1, [0, 1]), (1, [0, 1])]
    for step, moment in enumerate(bench.moments):
        samples = moment.rollouts.samples
        by_prompt = {row["id"]: [one for one in samples if one.row["id"] == row["id"]] for row in PROMPTS[:2]}
        numbers = {place: [one.sample for one in by_prompt[PROMPTS[place]["id"]]] for place in (0, 1)}
        assert numbers == ({0: list(range(16)), 1: list(range(12))} if step == 0 else {0: list(range(12)), 1: list(range(16))})
        for group in by_prompt.values():  # each sampled anew
            assert len({tuple(one.completion.ids) for one in group}) > 0.8 * len(group)
        hand = by_hand(moment.loop.config, moment, bench.folders)
        found = moment.rollouts.sums_B(moment.rollouts.tokens["advantages"])
        assert found.tolist() == close([one["advantages"].sum().item() for one in hand])
    assert (series(run, "groups"), series(run, "groups_without_spread")) == ([2, 2], [1, 1])


RATES = [0.5, None, 0.1, 0.9, 0.3, float("nan"), 0.7, 0.2, 0.8]
ORDERS: list[tuple[dict[str, Any], list[int]]] = [
    ({"order": "falling"}, [3, 8, 6, 0, 4, 7, 2]),
    ({"order": "rising"}, [2, 7, 4, 0, 6, 8, 3]),
    ({"order": "falling", "minimum": 0.2, "maximum": 0.8}, [8, 6, 0, 4, 7]),
    ({"maximum": 0.3}, [2, 4, 7]),
]


@pytest.mark.parametrize(("curriculum", "expected"), ORDERS)
def test_the_curriculum_says_which_prompts_and_in_which_order(
    bench: Bench, drawn: list[tuple[int, list[int]]], curriculum: dict[str, Any], expected: list[int]
) -> None:
    rows = [row | {"difficulty": rate} for row, rate in zip(PROMPTS, RATES, strict=True)]
    inputs = {"prompts": folder(bench.path / "prompts", rows)}
    column = {"column": "difficulty"}
    run = bench.train(
        steps=4, prompts=2, group=2, inputs=inputs, curriculum=column | curriculum, reference_kl={"measure": False}
    )
    places = [place for _, some in drawn for place in some]
    if "order" in curriculum:
        assert places == [*expected, *expected][:8]
    else:
        assert set(places) == set(places[:3]) == set(places[3:6]) == set(expected)
    [table] = [event["rows"] for event in events(run, "table") if event["name"] == "curriculum"]
    assert [row["rows"] for row in table] == [len(expected), 7 - len(expected), 2]
    assert [row["what"] for row in table] == ["used", "left out: difficulty out of bounds", "left out: no difficulty"]


def test_a_curriculum_that_cannot_be_is_refused(bench: Bench) -> None:
    for curriculum, message in (
        ({"order": "rising"}, "the curriculum is by the column 'pass_rate', which the prompts do not have .*kind"),
        ({"column": "answer", "minimum": 0.5}, "no prompt's answer is within 0.5 and inf"),
    ):
        with pytest.raises(InputError, match=message):
            bench.train(str(len(curriculum)), curriculum=curriculum)
    assert bench.sampled == []


def test_prompts_that_do_not_fit_are_dropped_and_counted(bench: Bench) -> None:
    # The reference reads 24 tokens: a prompt of 16 leaves room for 8, one of 17 does not. The policy reads 128.
    short: Folders = {"reference": folder(bench.path / "reference")}
    model: Any = load_policy(bench.folders["init"])
    model.model.config.max_position_embeddings = 24
    save_checkpoint(model.model, model.tokenizer, short["reference"])
    texts = ["1" + "+1" * count for count in (12, 13, 14, 124)]
    rows = PROMPTS[:4] + [{"id": text, "prompt": [{"role": "user", "content": text}], "kind": "sum"} for text in texts]
    prompts = folder(bench.path / "prompts", rows)
    for name, inputs, used in (("short", short, 5), ("long", {}, 7)):
        run = bench.train(name, steps=1, prompts=used, inputs=inputs | {"prompts": prompts})
        lengths = {sample.row["id"]: len(sample.prompt_ids) for sample in bench.moments[-1].rollouts.samples}
        assert (len(lengths), lengths[texts[0]]) == (used, 16)
        [table] = [event["rows"] for event in events(run, "table") if event["name"] == "prompts"]
        assert table == [{"what": "used", "rows": used}, {"what": "dropped: fills the context", "rows": 8 - used}]
        assert metrics(run)[1]["groups"] == used
    for count, inputs in ((3, short), (1, {})):
        last = folder(bench.path / f"last {count}", rows[-count:])
        with pytest.raises(InputError, match=f"all {count} prompts fill the context.*sampling.max_new_tokens"):
            bench.train(str(count), inputs=inputs | {"prompts": last})
    assert bench.sampled == [0, 0]
