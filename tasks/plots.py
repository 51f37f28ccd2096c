"""The plot that a person looks at after reinforcement learning: what the reward cost in KL."""

from __future__ import annotations

from pathlib import Path

from tasks.store import Store


def reward_against_kl(store: Store, run_id: str, title: str, path: Path) -> Path | None:
    """Draw a run's reward against its KL from the reference, a point a step, to `path` (PNG) and beside the run in MLflow.

    None for a run that has no such metrics. A plot that is there already is left as it is.
    """
    if path.is_file():
        return path
    kl, reward = ({m.step: m.value for m in store.client.get_metric_history(run_id, name)} for name in ("kl", "reward"))
    steps = sorted(kl.keys() & reward.keys())
    if len(steps) < 2:
        return None
    # Matplotlib takes most of a second to import, which skipped steps do not pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    x, y = [kl[step] for step in steps], [reward[step] for step in steps]
    axes.plot(x, y, color="0.8", linewidth=1, zorder=1)
    points = axes.scatter(x, y, c=steps, cmap="viridis", s=18, zorder=2)
    figure.colorbar(points, label="step")
    axes.set(title=title, xlabel="KL from the reference (nats a completion)", ylabel="reward (less penalties)")
    # The file under its name says that all is done.
    draft = path.parent / f".draft-{run_id}" / path.name
    draft.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(draft))
    store.client.log_artifact(run_id, str(draft), "plots")
    draft.replace(path)
    draft.parent.rmdir()
    return path
