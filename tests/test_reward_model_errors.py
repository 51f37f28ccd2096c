"""What a reward model cannot be trained on, and a loss that is not finite."""

from __future__ import annotations

import pytest
import reward_bench
from reward_bench import Fit, Make, Row
from test_sft import Rows

import stages.models.reward
import stages.reward_model
from stages.errors import InputError
from stages.request import run_stage

request_of = reward_bench.request_of
fit = reward_bench.fit
pairs = reward_bench.pairs
THREE = {"completions": ["1", "2", "3"], "ranks": [1, 2, 3]}
# The first row is dropped: the message counts the rows of the source.
NO_MARGIN = [{"chosen": a, "rejected": "2", "margin": m} for a, m in (("2", 1.0), ("1", 0.0), ("3", None), ("4", None))]


@pytest.mark.parametrize(
    ("changes", "name", "rows", "message"),
    [
        ({}, "train", [{"chosen": "1"}], r'row 1 has neither "chosen" and "rejected" .* \(it has prompt, chosen\)'),
        ({}, "train", [{"completions": ["1"]}], r'nor "completions" and "ranks" \(it has prompt, completions\)'),
        ({"max_length": 5}, "train", [{"chosen": "1", "rejected": "2"}], r"no preference fits in 5 tokens \(.*too long': 2"),
        ({}, "heldout", [{"chosen": "1", "rejected": "1"}], r"no preference .*equal completions': 1"),
        ({"margin_weight": 1}, "train", NO_MARGIN, r'row 3 of train has no "margin"'),
        ({"margin_weight": 1}, "train", [{"chosen": "1", "rejected": "2"}], r'row 1 of train has no "margin"'),
        ({"margin_weight": 1}, "train", [THREE], "are for pairs; these rows are rankings"),
        ({"center_weight": 1}, "train", [THREE], "are for pairs; these rows are rankings"),
        ({}, "samples", [{"text": "1"}], r'samples: its rows have no column "completion" \(they have prompt, text\)'),
        ({}, "demonstrations", [{"completion": "+1" * 96}], "demonstrations: no completion fits in 96 tokens"),
    ],
)
def test_what_does_not_go_together(request_of: Make, pairs: Rows, changes: Row, name: str, rows: Rows, message: str) -> None:
    data = {"train": pairs, "heldout": pairs} | {name: [{"prompt": pairs[0]["prompt"]} | row for row in rows]}
    with pytest.raises(InputError, match=message):
        run_stage(request_of({"steps": 1} | changes, **data))


def test_a_model_whose_scores_would_be_misread_is_refused(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.models.reward, "last_tokens", lambda batch: batch.position_ids_BT == 0)
    with pytest.raises(InputError, match=r"wrong by .* in its scores: this family is not supported"):
        fit({}, pairs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_with_its_rows(request_of: Make, pairs: Rows) -> None:
    # Row 2 is dropped: the message counts the rows of the source.
    rows = [*pairs[:2], pairs[2] | {"chosen": "1", "rejected": "1"}, *pairs[3:9]]
    changes = {"center_weight": 1, "optimizer": {"lr": 1e30}, "runtime": {"save_every": 1}}
    request = request_of(changes, train=rows, heldout=pairs[9:])
    with pytest.raises(InputError, match=r"step 2, rows \[1, 2, 4, 5, 6, 7, 8, 9\] of train: loss is .*(nan|inf)"):
        run_stage(request)
    [state] = (request.folder / "state").iterdir()
    assert state.name == "step-00000001"
