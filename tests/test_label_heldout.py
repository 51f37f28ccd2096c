"""Which prompts' preferences are held out."""

from __future__ import annotations

from pathlib import Path

import labelling
import pytest
from conftest import request_for
from labelling import (
    CONFIG,
    RANKINGS,
    Label,
    Make,
    group,
    many,
    metrics,
    outputs,
    preferences,
    within,
)

from stages.errors import InputError
from stages.request import run_stage
from stages.run import Run

registered = labelling.registered
label = labelling.label


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


def test_all_held_out_says_so(label: Label) -> None:
    with pytest.raises(InputError, match="all 1 preferences were held out: lower heldout"):
        label(group("a", "1", "2"), CONFIG | {"heldout": 0.999999})
