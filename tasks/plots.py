"""The plot that a person looks at after reinforcement learning: what the reward cost in KL, how rewards and length went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.store import Store

Series = Mapping[int, float]


def rl_curves(store: Store, run_id: str, title: str, path: Path) -> Path | None:
    """Draw a run of PPO or GRPO to `path` (PNG) and beside the run in MLflow: its reward against its KL from the reference, a
    point a step, where the KL was measured; its rewards, and the completions' length, by step.

    None for a run without two steps that have a reward. A plot that is there already is left as it is.
    """
    if path.is_file():
        return path
    parts = sorted(
        name
        for name in store.client.get_run(run_id).data.metrics
        if name.startswith("rewards.") and not name.endswith("_before")
    )
    logged = {name: series(store, run_id, name) for name in ("reward", "kl", "length", *parts)}
    if len(logged["reward"]) < 2:
        return None
    measured = len(logged["kl"].keys() & logged["reward"].keys()) > 1
    figure = new_figure(11 if measured else 6, title)
    *first, last = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for axes in first:
        _against_kl(figure, axes, logged["reward"], logged["kl"])
    _by_step(last, {name: logged[name] for name in ("reward", *parts)}, logged["length"])
    return keep(store, run_id, figure, path)


def new_figure(width: float, title: str) -> Any:
    """An empty figure."""
    # Matplotlib takes most of a second to import, which skipped steps do not pay.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    figure.suptitle(title)
    return figure


def keep(store: Store, run_id: str, figure: Any, path: Path) -> Path:
    """Write a figure to `path` (PNG) and beside a run in MLflow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # The file under its name says that all is done.
    draft = path.parent / f".draft-{run_id}" / path.name
    draft.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(draft))
    store.write(run_id, f"plots/{path.name}", draft.read_bytes())
    draft.replace(path)
    draft.parent.rmdir()
    return path


def series(store: Store, run_id: str, name: str) -> Series:
    """A metric by step, the values measured before training left out."""
    return {m.step: m.value for m in sorted(store.client.get_metric_history(run_id, name), key=lambda m: m.step) if m.step}


def _against_kl(figure: Any, axes: Any, reward: Series, kl: Series) -> None:
    steps = sorted(kl.keys() & reward.keys())
    x, y = [kl[step] for step in steps], [reward[step] for step in steps]
    axes.plot(x, y, color="0.8", linewidth=1, zorder=1)
    points = axes.scatter(x, y, c=steps, cmap="viridis", s=18, zorder=2)
    figure.colorbar(points, label="step")
    axes.set(xlabel="KL from the reference (nats a completion)", ylabel="reward (less penalties)")


def _by_step(axes: Any, rewards: Mapping[str, Series], length: Series) -> None:
    for name, values in rewards.items():
        axes.plot(list(values), list(values.values()), label=name, linewidth=2 if name == "reward" else 1)
    axes.set(xlabel="step", ylabel="reward")
    if length:
        other = axes.twinx()
        other.plot(list(length), list(length.values()), color="0.5", linestyle="--")
        axes.plot([], [], color="0.5", linestyle="--", label="length")
        other.set(ylabel="length (tokens)")
    axes.legend(fontsize="small")
