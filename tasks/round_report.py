"""What a person reads of rounds: a table of all so far, and a plot of how the champion grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tasks.display import print_wide
from tasks.execute import number
from tasks.plots import keep, new_figure
from tasks.report import with_interval
from tasks.rounds import Outcome, Round
from tasks.store import Store

SHOWN = ("win_rate", "kl", "length")


def figures(metrics: Mapping[str, Mapping[str, float]], main: str) -> dict[str, float]:
    """What a table of rounds shows of one, of its steps' metrics; what none measured is left out."""
    candidate, champion = metrics["evaluate-candidate"], metrics["evaluate-champion"]
    labels = [metrics[name]["rows_train"] for name in ("preferences", "heldout_preferences") if name in metrics]
    found = {"prompts": metrics["fresh"]["rows_train"], "labels": sum(labels)}
    named = [("pair_accuracy", metrics.get("reward_model", {})), *((name, candidate) for name in dict.fromkeys((*SHOWN, main)))]
    for name, source in named:
        found |= {one: source[one] for one in (name, f"{name}_low", f"{name}_high") if one in source}
    return found | {f"champion.{name}": champion[name] for name in (main, "length") if name in champion}


def print_rounds(console: Console, recipe: str, rounds: Sequence[Round]) -> None:
    """Every round with what it learnt from, what came of it, and why."""
    mains = list(dict.fromkeys(one.outcome.main for one in rounds if one.outcome))
    table = Table(title=f"{recipe}: rounds so far", title_justify="left")
    for column in ("round", "prompts", "labels in all", "pair accuracy", *mains, "win rate", "KL", "length"):
        table.add_column(column, justify="right")
    table.add_column("what")
    for one in rounds:
        cells = _cells(one.outcome, mains) if one.outcome else [""] * (len(mains) + 6)
        table.add_row(str(one.number), *cells, one.state.replace("_", " "))
    print_wide(console, table)
    for one in rounds:
        if one.ended:
            what = f"promoted as {one.champion}/{one.version}" if one.version else "its candidate was not promoted"
            console.print(f"round {one.number}: {what}: {one.why}", soft_wrap=True, markup=False)


def as_rows(rounds: Sequence[Round]) -> list[dict[str, str]]:
    """The same for Prefect's page, a round a row."""
    rows = []
    for one in rounds:
        row = {"round": str(one.number), "what": one.state.replace("_", " "), "why": one.why}
        if one.outcome:
            names = ("prompts", "labels in all", "pair accuracy", one.outcome.main, "win rate", "KL", "length")
            row |= dict(zip(names, _cells(one.outcome, [one.outcome.main]), strict=True))
        rows.append({name: value.replace("\n", " ") for name, value in row.items()})
    return rows


def _cells(outcome: Outcome, mains: Sequence[str]) -> list[str]:
    figures = outcome.figures

    def shown(name: str) -> str:
        return with_interval(figures, name).replace(" (", "\n(") if name in figures else ""

    def grown(name: str) -> str:
        before = f"champion.{name}"
        return f"{number(figures[before])} -> {shown(name)}" if before in figures and name in figures else shown(name)

    counts = [f"{figures[name]:.0f}" for name in ("prompts", "labels")]
    return [*counts, shown("pair_accuracy"), *map(grown, mains), shown("win_rate"), shown("kl"), grown("length")]


def rounds_plot(store: Store, rounds: Sequence[Round]) -> Path | None:
    """Draw the main metric of champions and candidates over the rounds that have ended, to a PNG and beside the last round's
    run in MLflow. None before one has."""
    ended = [one for one in rounds if one.ended and one.outcome]
    if not ended:
        return None
    last = ended[-1]
    path = store.root / "plots" / f"{last.recipe}-round-{last.number}.png"
    if path.is_file():
        return path
    assert last.outcome is not None
    main = last.outcome.main
    figure = new_figure(7, last.recipe)
    axes = figure.subplots()
    steps = [(one.number, one.outcome) for one in ended if one.outcome and one.outcome.main == main]
    before = [(n, outcome.figures[f"champion.{main}"]) for n, outcome in steps if f"champion.{main}" in outcome.figures]
    axes.plot([n for n, _ in before], [value for _, value in before], color="0.6", marker="_", label="the round's champion")
    for promoted, face, label in ((True, "C0", "candidate, promoted"), (False, "none", "candidate, kept out")):
        shown = [one for one in ended if (one.state == "promoted") is promoted and one.outcome and one.outcome.main == main]
        points = [(one.number, one.outcome.figures) for one in shown if one.outcome and main in one.outcome.figures]
        values = [figures[main] for _, figures in points]
        spread = [
            [value - figures.get(f"{main}_low", value) for value, (_, figures) in zip(values, points, strict=True)],
            [figures.get(f"{main}_high", value) - value for value, (_, figures) in zip(values, points, strict=True)],
        ]
        if points:
            style = {"color": "C0", "marker": "o", "markerfacecolor": face, "linestyle": "none"}
            axes.errorbar([n for n, _ in points], values, yerr=spread, label=label, **style)
    axes.set(xlabel="round", ylabel=f"held-out {main}", xticks=[one.number for one in ended])
    axes.legend(fontsize="small")
    return keep(store, last.id, figure, path)
