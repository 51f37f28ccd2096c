"""Preference optimisation on a fresh seed of the quickstart's task: every method beats SFT, and what overfits does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import run_recipe

from tasks.plots import series
from tasks.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def metrics(stages: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name.removeprefix("evaluate-"): one["metrics"] for name, one in stages.items() if one["stage"] == "evaluate"}


def test_every_method_learns_from_the_same_pairs(state: Path) -> None:
    found = metrics(run_recipe(state, "dpo-quickstart", "--seed", "11"))
    print({name: [round(one.get(k, 0.0), 3) for k in ("accuracy", "win_rate", "kl", "length")] for name, one in found.items()})
    for name in ("dpo", "ipo", "kto", "cpo", "simpo", "two_d_dpo", "online"):
        assert found[name]["accuracy"] >= found["sft"]["accuracy"] + 0.12, name
        assert found[name]["win_rate"] >= 0.58, name
    for name in ("orpo", "curry"):
        assert found[name]["win_rate_low"] > 0.5, name
    # It learns to be like its demonstrations, of which half are no better than SFT.
    assert found["spin"]["win_rate"] > 0.42
    assert len(list((state / "plots").glob("dpo-quickstart-methods-*.png"))) == 1


def test_the_margin_of_ipo_stays_near_its_target_where_that_of_dpo_grows(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = metrics(stages := run_recipe(state, "dpo-overfit", "--seed", "11"))
    monkeypatch.setenv("POSTTRAIN_HOME", str(state))
    store = Store(state)
    run_of = {name: next(run.info.run_id for run in store.runs(step=name, recipe="dpo-overfit")) for name in ("dpo", "ipo")}
    margins = {name: list(series(store, run_id, "train_margin").values()) for name, run_id in run_of.items()}
    part = len(margins["dpo"]) // 8
    first, last = (
        {name: sum(of[span]) / part for name, of in margins.items()} for span in (slice(part, 2 * part), slice(-part, None))
    )
    print(stages["dpo"]["seconds"], first, last, {name: round(one["accuracy"], 3) for name, one in found.items()})
    assert last["dpo"] > 1.15 * first["dpo"]
    assert 0.35 < last["ipo"] < 0.6  # the target is 1 / (2 tau) = .5
    assert abs(last["ipo"] - first["ipo"]) < 0.1
    assert found["ipo"]["kl"] < found["dpo"]["kl"]
