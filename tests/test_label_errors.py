"""Samples and configs of which no preference can come."""

from __future__ import annotations

from pathlib import Path

import labelling
import pytest
from labelling import (
    CONFIG,
    SCORED,
    Label,
    group,
)

import stages.label
from stages.errors import InputError

registered = labelling.registered
label = labelling.label


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
    with pytest.raises(InputError, match=r"reward 'worth' needs the column 'answer', which is not in the samples"):
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


def test_samples_of_a_prompt_that_stand_apart_are_refused(label: Label) -> None:
    with pytest.raises(InputError, match="the samples of the prompt with id 'id of a' do not stand side by side"):
        label([*group("a", "1"), *group("b", "1", "2"), *group("a", "2")])


def test_samples_without_a_completion_are_refused(label: Label) -> None:
    rows = [{name: value for name, value in row.items() if name != "completion"} for row in group("a", "1", "2")]
    with pytest.raises(InputError, match='the samples have no column "completion"'):
        label(rows)
