"""The plot of reward against KL and over steps, beside its run in a real MLflow over SQLite: made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from mlflow.entities import Metric

from tasks.plots import rl_curves
from tasks.store import Store

PNG = b"\x89PNG\r\n\x1a\n"
IDENTITY: dict[str, Any] = {"stage": "ppo", "version": 1, "config": {}, "inputs": {}}
# Out of order, as a resumed run may have logged them; step 3 has no reward.
KL, REWARD = {4: 0.9, 1: 0.0, 2: 0.5, 3: 0.7}, {2: -1.0, 4: 2.0, 1: -3.0, 9: 7.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def run_with(store: Store, **metrics: dict[int, float]) -> str:
    tags = {"key": "k", "stage": "ppo", "step": "rl", "recipe": "r"}
    run_id = store.begin("r", "rl", tags, IDENTITY)
    logged = [Metric(name, value, 0, step) for name, values in metrics.items() for step, value in values.items()]
    store.client.log_batch(run_id, metrics=logged)
    return run_id


def artifacts(store: Store, run_id: str) -> list[str]:
    folder = store.root / "artifacts" / "r" / run_id / "artifacts"
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("plots/*"))]


def beside(store: Store, run_id: str, name: str) -> Path:
    return store.root / "artifacts" / "r" / run_id / "artifacts" / "plots" / name


class Drawn:
    """What matplotlib is asked to draw: lines by their label, points, words."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lines: dict[str | None, Any] = {}
        self.points: list[Any] = []
        self.words: dict[str, list[Any]] = {}
        plot, scatter = Axes.plot, Axes.scatter

        def plotted(axes: Axes, x: Any, y: Any, **fields: Any) -> Any:
            self.lines[fields.get("label", fields.get("linestyle"))] = (list(x), list(y))
            return plot(axes, x, y, **fields)

        def scattered(axes: Axes, x: Any, y: Any, **fields: Any) -> Any:
            self.points.append((list(x), list(y), list(fields["c"])))
            return scatter(axes, x, y, **fields)

        patch.setattr(Axes, "plot", plotted)
        patch.setattr(Axes, "scatter", scattered)
        patch.setattr(Axes, "set", lambda _, **fields: [self.words.setdefault(k, []).append(v) for k, v in fields.items()])


def test_the_plot_is_made_once_and_lies_beside_the_run(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"loss": {1: 1.0}, "length": {2: 7.0, 1: 5.0}, "rewards.answer": {1: 0.5, 2: 0.6}, "rewards.format_before": {0: 9.0}}
    run_id, path = run_with(store, kl=KL, reward=REWARD, **more), tmp_path / "new" / "folders" / "r-rl-1.png"
    drawn = Drawn(monkeypatch)
    assert rl_curves(store, run_id, "r-rl-1", path) == path
    # A point a step that has both, in the order of steps.
    assert drawn.points == [([0.0, 0.5, 0.9], [-3.0, -1.0, 2.0], [1, 2, 4])]
    assert drawn.lines["reward"] == ([1, 2, 4, 9], [-3.0, -1.0, 2.0, 7.0])
    assert drawn.lines["rewards.answer"] == ([1, 2], [0.5, 0.6])
    assert drawn.lines["--"] == ([1, 2], [5.0, 7.0])
    assert drawn.lines.keys() == {None, "reward", "rewards.answer", "--", "length"}
    assert ["KL" in drawn.words["xlabel"][0], *drawn.words["xlabel"][1:]] == [True, "step"]
    made = path.read_bytes()
    assert made.startswith(PNG)
    assert artifacts(store, run_id) == ["plots/r-rl-1.png"]
    assert beside(store, run_id, "r-rl-1.png").read_bytes() == made

    drawn.lines.clear()
    time = path.stat().st_mtime_ns
    assert rl_curves(store, run_id, "r-rl-1", path) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (made, time)
    assert drawn.lines == {}
    assert artifacts(store, run_id) == ["plots/r-rl-1.png"]


def test_without_a_kl_there_are_the_curves_by_step(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    assert rl_curves(store, run_with(store, reward=REWARD, kl={1: 0.5}), "r", tmp_path / "r.png") is not None
    assert (drawn.points, list(drawn.lines)) == ([], ["reward"])


def test_a_plot_that_is_there_is_left_as_it_is(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "r-rl-1.png"
    path.write_text("a person's own")
    assert rl_curves(store, run_with(store, kl=KL, reward=REWARD), "r-rl-1", path) == path
    assert path.read_text() == "a person's own"


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"kl": KL},
        {"kl": {1: 0.1}, "reward": {1: 2.0}},
        {"kl": KL, "reward_before": REWARD},
    ],
)
def test_a_run_without_two_steps_of_a_reward_has_no_plot(store: Store, tmp_path: Path, metrics: dict[str, Any]) -> None:
    run_id, path = run_with(store, **metrics), tmp_path / "plots" / "r.png"
    assert rl_curves(store, run_id, "r", path) is None
    assert not path.parent.exists()
    assert artifacts(store, run_id) == []


def test_two_steps_make_a_plot(store: Store, tmp_path: Path) -> None:
    run_id = run_with(store, kl={1: 0.1, 2: 0.2}, reward={1: 2.0, 2: 3.0})
    assert rl_curves(store, run_id, "r", tmp_path / "r.png") == tmp_path / "r.png"
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)
