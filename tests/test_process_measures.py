"""What a process model measures of held-out steps, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reward_bench
from reward_bench import Fit, Row, series, tables
from test_sft import Rows

import stages.reward_model
from stages.statistics import summary

request_of = reward_bench.request_of
fit = reward_bench.fit

# The raw scores that the model gives to steps, by their text, which is that of a word.
RAW = {"1": 2.0, "2": -1.0, "3": 0.5, "4": -3.0, "5": 0.0}
# Steps; labels; whether each is called right (5 is not); soft labels are right above one half, and neither at one half.
CASES: list[tuple[str, list[float]]] = [
    ("1 3 2", [1, 1, 0]),  # all found
    ("1 2 1", [1, 1, 0]),  # wrong too soon
    ("2 1", [0, 1]),  # the first wrong one found
    ("3 3", [0.75, 1]),  # all right, found
    ("1 4 1", [1, 0.5, 1]),  # all right but one of a half, which is called wrong
    ("1 1 5", [1, 0.25, 0]),  # a later one found
    ("1 3 1", [1, 0.5, 1]),  # a half that is called right
    ("5", [0]),  # a score of 0 calls a step wrong
]


def raw(*arguments: Any) -> list[np.ndarray]:
    """In the place of `raw_step_scores`, of rows in their order."""
    return [np.array([RAW[step] for step in steps.split()]) for steps, _ in CASES[: len(arguments[2])]]


def bce(score: float, label: float) -> float:
    p = 1 / (1 + math.exp(-score))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def test_steps_are_measured(fit: Fit, chain_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.reward_model, "raw_step_scores", raw)
    rows: list[Row] = [
        {"prompt": chain_rows[0]["prompt"], "completions": steps.split(), "labels": [float(one) for one in labels]}
        for steps, labels in CASES
    ]
    run = fit({"steps": 1, "seed": 5, "step_separator": ";"}, rows)
    pairs = [[(RAW[step], label) for step, label in zip(steps.split(), labels, strict=True)] for steps, labels in CASES]
    every = [one for row in pairs for one in row]
    assert series(run, "heldout_loss") == [pytest.approx(np.mean([bce(*one) for one in every]), abs=1e-6)]

    def share(keep: Any) -> list[list[float]]:
        hits = [[float((score > 0) == (label > 0.5)) for score, label in row if keep(label)] for row in pairs]
        return [one for one in hits if one]

    expected = {
        "step_accuracy": share(lambda label: label != 0.5),
        "step_accuracy_right": share(lambda label: label > 0.5),
        "step_accuracy_wrong": share(lambda label: label < 0.5),
        "first_wrong_found": [[1.0], [0.0], [1.0], [0.0], [1.0]],
        "all_right_found": [[1.0], [0.0], [1.0]],
    }
    assert [len(rows) for rows in expected.values()] == [8, 7, 5, 5, 3]
    for name, rows_of in expected.items():
        # This seed's 200 resamples of rows.
        wanted = summary(name, rows_of, 200, 5)
        assert {key: series(run, key) for key in wanted} == {key: [pytest.approx(one)] for key, one in wanted.items()}
    assert series(run, "first_wrong_f1") == [pytest.approx(2 / (5 / 3 + 3 / 2))]
    # By confidence in bins of 0.1: what is called right or wrong of each step that is one of them.
    sure = [(1 / (1 + math.exp(-abs(score))), (score > 0) == (label > 0.5)) for score, label in every if label != 0.5]
    bins = [[one for one in sure if min(4, int((one[0] - 0.5) * 10)) == k] for k in range(5)]
    wanted = [[0.5 + 0.1 * k, len(one), *np.mean(one, axis=0)] for k, one in enumerate(bins) if one]
    assert np.array([list(row.values()) for row in tables(run)["calibration"]]) == pytest.approx(np.array(wanted))
    assert list(tables(run)["calibration"][0]) == ["from", "steps", "confidence", "accuracy"]
    error = sum(abs(sum(a for a, _ in one) - sum(b for _, b in one)) for one in bins) / len(sure)
    assert series(run, "calibration_error") == [pytest.approx(error)]
    scored = tables(run)["scores"]
    assert [row["step_scores"] for row in scored] == [[pytest.approx(1 / (1 + math.exp(-s))) for s, _ in row] for row in pairs]


def test_without_a_wrong_step_none_is_measured(fit: Fit, chain_rows: Rows) -> None:
    rows: list[Row] = [{"prompt": chain_rows[0]["prompt"], "completions": ["1", "2"], "labels": [1.0, 1.0]}]
    run = fit({"steps": 1, "step_separator": ";"}, rows)
    assert len(series(run, "all_right_found")) == len(series(run, "step_accuracy_right")) == 1
    assert series(run, "first_wrong_found", "first_wrong_f1", "step_accuracy_wrong") == []
