"""What a person reads: a table of steps at the end of a run, a plan before it, the list of artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table

from stages.specs import STAGES
from tasks.display import print_wide
from tasks.execute import StepResult, headline_names, number
from tasks.plan import Plan
from tasks.store import Store


def print_results(console: Console, recipe: str, results: Sequence[StepResult]) -> None:
    """The steps of a run: what ran, how long, the numbers that matter, the artifacts."""
    table = Table(title=recipe, title_justify="left")
    for column in ("step", "what", "seconds", "held-out numbers", "artifacts"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for result in results:
        numbers = result.headline.replace("  ", "\n")
        artifacts = "\n".join(str(made) for made in result.artifacts.values())
        table.add_row(result.name, result.status, f"{result.seconds:.1f}", numbers, artifacts)
    print_wide(console, table)
    print_models(console, results)
    for result in results:
        if result.plot is not None:
            console.print(f"{result.name}: its curves in {result.plot}", soft_wrap=True, markup=False)
        if result.page is not None:
            console.print(f"{result.name}: label them in {result.page}", soft_wrap=True, markup=False)


def print_models(console: Console, results: Sequence[StepResult]) -> None:
    """The models that a run evaluated, side by side, with 95% intervals; nothing for fewer than three."""
    evaluated = [result for result in results if result.stage == "evaluate"]
    measured = {name: 0.0 for result in evaluated for name in result.metrics}
    names = [*headline_names(STAGES["evaluate"], measured), "length"]
    if len(evaluated) < 3:
        return
    table = Table(title="models side by side", title_justify="left")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for result in evaluated:
        known = [with_interval(result.metrics, name) if name in result.metrics else "" for name in names]
        table.add_row(result.name.removeprefix("evaluate-"), *known)
    print_wide(console, table)


def print_seeds(console: Console, recipe: str, of_seeds: Mapping[int, Sequence[StepResult]]) -> None:
    """The numbers that matter of each seed, with their 95% intervals where a step measured them; their mean over seeds."""
    table = Table(title=f"{recipe} over seeds", title_justify="left")
    for column in ("step", "number", *(f"seed {seed}" for seed in of_seeds), "mean"):
        table.add_column(column, justify="left" if column in ("step", "number") else "right")
    for steps in zip(*of_seeds.values(), strict=True):
        for name in headline_names(STAGES[steps[0].stage], steps[0].metrics):
            values = [step.metrics[name] for step in steps if name in step.metrics]
            if len(values) == len(steps):
                cells = [with_interval(step.metrics, name) for step in steps]
                table.add_row(steps[0].name, name, *cells, number(sum(values) / len(values)))
    print_wide(console, table)


def with_interval(metrics: Mapping[str, float], name: str) -> str:
    """`0.79 (0.748-0.83)`."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return number(metrics[name]) + ("" if low is None or high is None else f" ({number(low)}-{number(high)})")


def print_plan(console: Console, recipe: str, plans: Sequence[tuple[str, str, Plan]]) -> None:
    """What a run would do, and why."""
    table = Table(title=f"{recipe}: what a run would do", title_justify="left")
    for column in ("step", "stage", "what", "why"):
        table.add_column(column)
    for name, stage, plan in plans:
        table.add_row(name, stage, plan.action, plan.reason)
    print_wide(console, table)


def print_artifacts(store: Store, part: str) -> None:
    """Registered datasets and models with their versions, the newest first."""
    table = Table()
    for column in ("name", "kind", "version", "made", "digest", "aliases"):
        table.add_column(column, overflow="fold")
    models = sorted(store.client.search_registered_models(), key=lambda model: str(model.name))
    for model in models:
        if part not in model.name:
            continue
        for version in store.client.search_model_versions(f"name = '{model.name}'"):
            made = datetime.fromtimestamp(version.creation_timestamp / 1000).strftime("%Y-%m-%d %H:%M:%S")
            # MLflow's search leaves a version's own list of aliases empty.
            aliases = ", ".join(alias for alias, at in model.aliases.items() if str(at) == str(version.version))
            digest = version.tags.get("digest", "")[:12]
            table.add_row(model.name, model.tags.get("kind", ""), str(version.version), made, digest, aliases)
    print_wide(Console(), table)
