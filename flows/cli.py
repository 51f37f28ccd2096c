"""The `posttrain` command. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flows.commands import about_servers, require_servers
from stages.errors import InputError

if TYPE_CHECKING:
    from flows.runner import Definition

# Modules of flows/. Every stage is a flow too: flows/single.py.
PIPELINES = ("rlhf", "dpo", "r1", "rounds")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when all went well, 2 for what a person can mend (one line on stderr)."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="posttrain", description="Post-train language models in staged, versioned artifacts.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe; what is computed already is skipped")
    run.add_argument("recipe", type=Path, help="a YAML file, for example configs/quickstart.yaml")
    run.add_argument("--set", action="append", default=[], metavar="STEP.FIELD=VALUE", dest="settings", help="change one value")
    seeds = run.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="the recipe's seed")
    seeds.add_argument("--seeds", type=_numbers, metavar="N,N", help="run once a seed, and end with a table over the seeds")
    run.add_argument("--from", dest="from_step", metavar="STEP", help="recompute this step and what follows from it")
    run.add_argument("--labels", metavar="FILE", help="people's answers, for the round that waits for them (flow: rounds)")
    run.add_argument("--dry-run", action="store_true", help="say what each step would do, and why; compute nothing")
    run.add_argument("--detach", action="store_true", help="with servers up: start it on the pool control, say where, and end")
    run.add_argument("--json", action="store_true", help="end with one JSON document on stdout; all else goes to stderr")
    run.set_defaults(command=run_command)

    artifacts = commands.add_parser("artifacts", help="list the datasets and models made so far")
    artifacts.add_argument("name", nargs="?", help="only names that contain this")
    artifacts.set_defaults(command=artifacts_command)

    lineage = commands.add_parser("lineage", help="what an artifact was made from, by which code, config and versions")
    lineage.add_argument("reference", help="models:/NAME/VERSION, datasets:/NAME/VERSION, or NAME@ALIAS")
    lineage.add_argument("--json", action="store_true", help="one JSON document on stdout: a flat list, the artifact first")
    lineage.set_defaults(command=lineage_command)

    label = commands.add_parser("label", help="take people's answers into the round that waits for them, and go on with it")
    label.add_argument("recipe", type=Path, help="the recipe of the rounds")
    label.add_argument("answers", type=Path, nargs="+", help="the files that the page of questions saved")
    label.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", dest="settings", help="change one value"
    )
    label.add_argument("--seed", type=int, help="the recipe's seed")
    label.add_argument("--detach", action="store_true", help="with servers up: go on with it on the pool control, and end")
    label.set_defaults(command=label_command, seeds=None, from_step=None, dry_run=False, json=False)

    about_servers(commands)
    return top


def run_command(options: argparse.Namespace) -> int:
    """`posttrain run`."""
    stdout = _divert_stdout()
    from flows.recipe import parse, read_recipe

    seeds = options.seeds or [options.seed]
    every = [read_recipe(options.recipe, options.settings, seed) for seed in seeds]
    flow = flow_of(every[0], options.recipe)
    if flow == "rounds" and options.seeds:
        raise InputError("--seeds: a start is one round of one story; give each seed a name too: --seed 1 --set name=rounds-1")
    if flow != "rounds" and options.labels:
        raise InputError(f"--labels: the flow {flow} takes no answers of people; a recipe of the flow rounds does")
    from tasks.home import configure_environment

    root = configure_environment()
    if options.dry_run:
        if options.seeds:
            raise InputError("--dry-run plans one seed; give it with --seed")
        return _plan(options, every[0], stdout)
    if options.detach:
        return _detached(options, every, stdout)
    from flows.server import start_prefect_server, wait_until_ready

    # The server starts while this process imports what it needs.
    start_prefect_server(root)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    definition = definition_of(flow)
    recipes = [parse(definition.recipe, values, str(options.recipe)) for values in every]
    importlib.import_module("stages.request")
    wait_until_ready(root)
    from prefect import tags
    from rich.console import Console

    from tasks.display import Terminal
    from tasks.home import OURS_TAG
    from tasks.report import print_results, print_seeds

    documents, of_seeds = [], {}
    given = {"labels": options.labels} if options.labels else {}
    for recipe in recipes:
        with Terminal() as terminal, tags(OURS_TAG):
            results = of_seeds[recipe.seed] = definition.flow(recipe, from_step=options.from_step, **given)
        print_results(terminal.console, recipe.name, results)
        fields = {"name", "stage", "status", "seconds", "reason", "metrics", "artifacts"}
        stages = [result.model_dump(mode="json", include=fields) for result in results]
        more = definition.report(terminal.console, recipe) if definition.report is not None else {}
        documents.append({"seed": recipe.seed, "stages": stages, **more})
    if options.seeds:
        print_seeds(Console(stderr=True), recipes[0].name, of_seeds)
    if options.json:
        one = {name: value for name, value in documents[0].items() if name != "seed"}
        _write_document({"seeds": documents} if options.seeds else one, stdout)
    return 0


def label_command(options: argparse.Namespace) -> int:
    """`posttrain label`."""
    from tasks.home import configure_environment

    root = configure_environment()
    from tasks.references import ingest
    from tasks.store import Store

    name = options.recipe.stem.replace(".", "-")
    options.labels = f"datasets:/{ingest(Store(root), options.answers, 'dataset', f'{name}-people')}"
    return run_command(options)


def _detached(options: argparse.Namespace, every: list[dict[str, Any]], stdout: TextIO) -> int:
    from flows.deploy import start
    from flows.recipe import parse
    from flows.runner import check_pools

    require_servers()
    definition = definition_of(every[0]["flow"])
    recipes = [parse(definition.recipe, values, str(options.recipe)) for values in every]
    # Its run would say so too, but on a page.
    for recipe in recipes:
        check_pools(recipe)
    for recipe in recipes:
        given = {"labels": options.labels} if options.labels else {}
        print(start(definition.flow, recipe, options.from_step, **given), file=stdout, flush=True)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them, such as 0,1,2") from None


def flow_of(values: Mapping[str, Any], path: Path) -> str:
    """The name of the flow that a recipe is for. Raises InputError when there is no such flow."""
    from flows.recipe import near
    from stages.specs import STAGES

    flow = values["flow"]
    if flow not in (names := [*PIPELINES, *STAGES]):
        raise InputError(f"{path}: no flow is named {flow!r}{near(str(flow), names)}")
    return flow


def definition_of(name: str) -> Definition:
    """A flow's definition, by its name."""
    if name in PIPELINES:
        return importlib.import_module(f"flows.{name}").DEFINITION
    return importlib.import_module("flows.single").definition(name)


def _plan(options: argparse.Namespace, values: dict[str, Any], stdout: TextIO) -> int:
    from rich.console import Console

    from flows.recipe import parse
    from flows.runner import plan_pipeline
    from tasks.report import print_plan

    definition = definition_of(values["flow"])
    recipe = parse(definition.recipe, values, str(options.recipe))
    if definition.plan is not None:
        pipeline = definition.plan(recipe, options.from_step)
    else:
        pipeline = plan_pipeline(recipe, definition.steps, options.from_step)
    if options.json:
        rows = [
            {"name": name, "stage": stage, "action": plan.action, "reason": plan.reason} for name, stage, plan in pipeline.plans
        ]
        _write_document({"stages": rows}, stdout)
    else:
        print_plan(Console(file=stdout), recipe.name, pipeline.plans)
    return 0


def artifacts_command(options: argparse.Namespace) -> int:
    """`posttrain artifacts`."""
    _end_with_reader()
    from tasks.home import configure_environment
    from tasks.report import print_artifacts
    from tasks.store import Store

    print_artifacts(Store(configure_environment()), options.name or "")
    return 0


def lineage_command(options: argparse.Namespace) -> int:
    """`posttrain lineage`."""
    _end_with_reader()
    stdout = _divert_stdout()
    from rich.console import Console

    from tasks.home import configure_environment
    from tasks.lineage import print_lineage, trace
    from tasks.store import Store

    nodes = trace(Store(configure_environment()), options.reference)
    if options.json:
        _write_document({"nodes": [node.model_dump(mode="json") for node in nodes]}, stdout)
    else:
        print_lineage(Console(file=stdout), nodes)
    return 0


def _write_document(document: dict[str, Any], stdout: TextIO) -> None:
    json.dump(document, stdout, indent=1)
    stdout.write("\n")
    stdout.flush()


def _end_with_reader() -> None:
    """For commands that only tell: end without a word when the reader (`| head`) has seen enough."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _divert_stdout() -> TextIO:
    """Send everything that any library prints to stderr, and return the real stdout for the one document."""
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return real


if __name__ == "__main__":
    sys.exit(main())
