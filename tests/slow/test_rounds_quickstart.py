"""The quickstart of rounds, started four times: the champion gets better, and a gate that fails leaves the alias alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import posttrain
from test_lineage import store_at

from tasks.promote import champion

pytestmark = pytest.mark.slow


def start(state: Path, seed: int, *more: str) -> list[dict[str, Any]]:
    done = posttrain(state, "run", "configs/rounds-quickstart.yaml", "--json", "--seed", str(seed), *more)
    assert done.returncode == 0, done.stderr
    print(done.stderr[done.stderr.rindex("rounds so far") :])
    return json.loads(done.stdout)["rounds"]


@pytest.mark.parametrize("seed", [1])
def test_the_champion_gets_better_over_three_rounds(tmp_path: Path, seed: int) -> None:
    rounds = [start(tmp_path, seed) for _ in range(3)][-1]
    assert [(one["start"], one["count"]) for one in rounds] == [(0, 120), (120, 120), (240, 120)]
    labels = [one["outcome"]["figures"]["labels"] for one in rounds]
    assert labels == sorted(set(labels))
    figures = [one["outcome"]["figures"] for one in rounds if one["state"] == "promoted"]
    assert figures[0]["champion.accuracy"] + 0.1 < figures[-1]["accuracy"]
    assert all(one["win_rate_low"] > 0.5 for one in figures)
    assert all(one["accuracy"] > one["champion.accuracy"] - 0.02 for one in figures)

    store = store_at(tmp_path)
    version = champion(store, "rounds-quickstart-champion")
    assert version == str(len(figures))
    *_, last = start(tmp_path, seed, "--set", "gate.max_kl=0.001")
    assert last["state"] == "kept"
    assert "(at most 0.001 allowed)" in last["why"]
    assert champion(store, "rounds-quickstart-champion") == version
