"""Labels of steps by a reward that rates them, by hand, and that training takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import labelling
import pytest
from labelling import CONFIG, Label, Rows, Scores, chain_group, events, group, metrics, outputs, preferences
from pydantic import ValidationError

from stages.data.schemas import row_id
from stages.errors import InputError
from stages.rewards import REWARDS, RewardEntry, Score
from stages.specs.label import LabelConfig

registered = labelling.registered
label = labelling.label


def marked(completions: Sequence[str], rows: Sequence[Mapping[str, Any]], total: float | None = 0.0) -> Scores:
    """Each `,` ends a step, rated by the digit before it, in tenths; no verdict for a question mark."""
    found: Scores = []
    for text in completions:
        ends = [end for end, letter in enumerate(text) if letter == ","]
        scores = [int(text[end - 1]) / 10 for end in ends]
        found.append(None if "?" in text else Score(total, {}, scores, ends))
    return found


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "marked", RewardEntry(f"{__name__}:marked", version=1))


STEPS: dict[str, Any] = CONFIG | {"form": "steps", "reward": {"name": "marked"}}


def counts(run: Any) -> dict[str, int]:
    [table] = events(run, "table")
    assert table["name"] == "labelled completions"
    return {row["what"]: row["number"] for row in table["rows"]}


def labels(rows: Rows) -> list[tuple[list[str], list[float]]]:
    return [(row["completions"], row["labels"]) for row in rows]


def test_every_completion_has_its_steps_and_their_labels(label: Label) -> None:
    rows = [*group("a", "a0,b9,", "c6,"), *group("b", "a1,b5, and what is left")]
    run = label(rows, STEPS)
    assert labels(preferences(run)) == [
        (["a0,", "b9,"], [0.0, 0.9]),
        (["c6,"], [0.6]),
        (["a1,", "b5, and what is left"], [0.1, 0.5]),
    ]
    # One step in five is more right than wrong by its label, and one half is not.
    assert metrics(run) == {"rows_train": 3, "rows_heldout": 0, "steps": 5, "steps_right": 2 / 5}
    assert outputs(run) == {"train"}


def test_a_whole_row(label: Label) -> None:
    [row] = preferences(label(group("a", "a0,", level=7, finish="length", labels="x"), STEPS))
    expected = {"prompt": "a", "completions": ["a0,"], "labels": [0.0]}
    assert row == {"id": row_id(expected)} | expected | {"answer": "answer to a", "level": 7, "finish": "stop"}
    rows = group("a", "a0,")
    rows[0]["finish"] = "length"
    assert preferences(label(rows, STEPS))[0]["finish"] == "length"


def test_samples_without_rated_steps_text_or_news_are_counted(label: Label) -> None:
    run = label([*group("a", "?1,", "none", "a1,", "a1,", " "), *group("b", "a1,")], STEPS)
    assert labels(preferences(run)) == [(["a1,"], [0.1])] * 2
    expected = {"samples without rated steps": 3, "samples equal to one before": 1, "steps": 2, "steps right": 0}
    assert counts(run) == expected
    # Without a verdict there are no steps, whatever they are.
    with pytest.raises(InputError, match=r"no labelled completion came of the samples \(.*: does the reward rate steps\?"):
        label(group("a", "a1,"), STEPS | {"reward": {"name": "marked", "args": {"total": None}}})


def test_prompts_are_held_out_whole(label: Label) -> None:
    rows = [row for number in range(60) for row in group(f"{number}", "a1,", "a2,")]
    run = label(rows, STEPS | {"heldout": 0.3})
    train, heldout = ({row["prompt"] for row in preferences(run, name)} for name in ("train", "heldout"))
    assert len(train) + len(heldout) == 60
    assert 5 < len(heldout) < 35
    with pytest.raises(InputError, match="all 1 labelled completions were held out: lower heldout"):
        label([row for row in rows if row["prompt"] in sorted(heldout)[:1]][:1], STEPS | {"heldout": 0.3})


@pytest.mark.parametrize(
    ("reward", "completion", "message"),
    [
        ("worth", "1", r"no labelled completion came .*'samples without rated steps': 1"),
        (
            "beyond",
            "x",
            r"of the row with id 'id of a': \"labels\" are true, false or numbers .* that of step 1 is 1.5",
        ),
        ("below", "x", r"that of step 1 is -0.5"),
        ("nothing", "xy", r"of the row with id 'id of a': step 2 in \"completions\" must be text and not empty, it is ''"),
    ],
)
def test_steps_that_are_none_are_refused(
    label: Label, monkeypatch: pytest.MonkeyPatch, reward: str, completion: str, message: str
) -> None:
    for name in ("beyond", "below", "nothing"):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"{__name__}:{name}", version=1))
    with pytest.raises(InputError, match=message):
        label(group("a", completion), STEPS | {"reward": {"name": reward}})


def beyond(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    return [Score(1.0, {}, [1.5], [len(text) - 1]) for text in completions]


def below(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    return [Score(1.0, {}, [-0.5], [len(text) - 1]) for text in completions]


def nothing(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scores:
    return [Score(1.0, {}, [1.0, 1.0], [1, 1]) for _ in completions]


@pytest.mark.parametrize("changes", [{"reward": None}, {"noise": 0.1}, {"tie_within": 0.1}])
def test_what_is_for_comparisons_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="form: steps needs a `reward` that rates steps, and neither noise"):
        LabelConfig.model_validate(STEPS | changes)


def test_the_quickstart_s_rule_labels_written_steps(label: Label) -> None:
    steps = [["<think>12+3=15;", "15-9=6</think>", "<answer>6</answer>"], ["<think>12+3=14;", "14-9=5</think>"], ["<answer>6"]]
    rows = chain_group("12+3-9", *("".join(one) for one in steps))
    rows = [row | {"problem": "12+3-9", "answer": "6"} for row in rows]
    found = labels(preferences(label(rows, STEPS | {"reward": {"name": "chain_sum"}})))
    assert found == [(steps[0], [1.0, 1.0, 1.0]), (steps[1], [0.0, 0.0]), (steps[2], [0.0])]
    for steps_of, _ in found:
        assert list(accumulate(steps_of))[-1] in [row["completion"] for row in rows]
