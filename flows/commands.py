"""The commands about servers: up, ui, down, deploy. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from stages.errors import InputError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_DAYS = 3650
LAST_PORT = 65535


def about_servers(commands: Any) -> None:
    """Add these commands to a grammar."""
    up = commands.add_parser(
        "up", help="start servers and workers over the local state, or workers that join servers elsewhere"
    )
    up.add_argument(
        "--workers", type=_names, metavar="POOL,POOL", help="which pools have workers here; control,cpu,gpu when not given"
    )
    up.add_argument(
        "--gpus", action="append", metavar="0,1", help="GPUs of one gpu worker; may be given again; one each by default"
    )
    up.add_argument(
        "--pools", type=Path, metavar="FILE", help="a YAML file of work pools on Docker or Kubernetes, and of further ones"
    )
    up.add_argument("--prefect", metavar="ADDRESS", help="join this Prefect server in place of starting one ($PREFECT_API_URL)")
    up.add_argument("--mlflow", metavar="ADDRESS", help="join this MLflow server ($MLFLOW_TRACKING_URI)")
    _places(up)
    up.set_defaults(command=up_command)

    down = commands.add_parser("down", help="stop what `posttrain up` started over this state")
    down.set_defaults(command=down_command)

    deploy = commands.add_parser(
        "deploy", help="make a recipe a deployment on the servers, with a filled-in form, and schedule it"
    )
    deploy.add_argument("recipe", type=Path, help="a YAML file, for example configs/quickstart.yaml")
    deploy.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", dest="settings", help="change one value"
    )
    deploy.add_argument("--seed", type=int, help="the recipe's seed")
    when = deploy.add_mutually_exclusive_group()
    when.add_argument("--every", metavar="TIME", type=_duration, help="run it so often: 90s, 30m, 12h, 7d; never twice at once")
    when.add_argument("--cron", metavar="'MIN HOUR DAY MONTH WEEKDAY'", help="run it at these times")
    deploy.set_defaults(command=deploy_command)

    ui = commands.add_parser(
        "ui", help="serve Prefect's and MLflow's pages over the local state until ctrl-C: up without workers"
    )
    _places(ui)
    ui.set_defaults(command=up_command, workers=[], gpus=None, pools=None, prefect=None, mlflow=None)


def up_command(options: argparse.Namespace) -> int:
    """`posttrain up` and `posttrain ui`."""
    from tasks.home import configure_environment, server

    prefect = options.prefect or os.environ.get("PREFECT_API_URL")
    mlflow = options.mlflow or server()
    if (prefect is None) != (mlflow is None):
        raise InputError("to join servers give the addresses of both, with --prefect and --mlflow")
    if prefect is None and options.prefect_port == options.mlflow_port:
        raise InputError(
            f"--prefect-port and --mlflow-port are both {options.prefect_port}: give each server a port of its own"
        )
    root = configure_environment()
    from flows.control import POOLS, Up, up
    from flows.pool_file import PoolFile, read_pools

    file = PoolFile() if options.pools is None else read_pools(options.pools)
    asked = Up(
        host=options.host,
        prefect_port=options.prefect_port,
        mlflow_port=options.mlflow_port,
        prefect=prefect.removesuffix("/").removesuffix("/api") if prefect else None,
        mlflow=mlflow,
        pools=list({**POOLS, **file.pools}) if options.workers is None else options.workers,
        gpus=options.gpus,
        file=file,
    )
    up(root, asked, lambda line: print(line, flush=True))
    return 0


def down_command(options: argparse.Namespace) -> int:
    """`posttrain down`."""
    del options
    from flows.control import down
    from tasks.home import home

    print("stopped" if down(home()) else f"nothing is up over {home()}")
    return 0


def deploy_command(options: argparse.Namespace) -> int:
    """`posttrain deploy`."""
    from tasks.home import configure_environment

    configure_environment()
    from datetime import timedelta

    from flows.cli import definition_of, flow_of
    from flows.recipe import parse, read_recipe

    values = read_recipe(options.recipe, options.settings, options.seed)
    definition = definition_of(flow_of(values, options.recipe))
    from flows.deploy import check_cron, deploy_recipe
    from flows.runner import check_pools

    # Not while the arguments are read: Prefect's rules come with Prefect, which must see the environment first.
    if options.cron is not None:
        check_cron(options.cron)
    require_servers()
    recipe = parse(definition.recipe, values, str(options.recipe))
    # Each of its runs would say so, on pages that nobody may look at.
    check_pools(recipe)
    every = None if options.every is None else timedelta(seconds=options.every)
    print(deploy_recipe(definition.flow, recipe, every, options.cron))
    return 0


def require_servers() -> None:
    """Raise InputError when no servers are up."""
    from tasks.home import home, server

    if server() is None:
        raise InputError(f"no servers are up over {home()}; start them with `posttrain up`")


def _places(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="where the servers listen: this machine alone when not given, 0.0.0.0 for all networks. Others are let in by "
        "$POSTTRAIN_USER and $POSTTRAIN_PASSWORD alone, which must be set here and there",
    )
    command.add_argument("--prefect-port", type=_port, metavar="PORT", default=4200, help="4200 when not given")
    command.add_argument("--mlflow-port", type=_port, metavar="PORT", default=5000, help="5000 when not given")


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part and part != "none"]


def _duration(text: str) -> int:
    # No more digits than the longest time has seconds: Python itself refuses to read very long ones.
    seconds = int(text[:-1]) * UNITS[text[-1]] if re.fullmatch(r"[0-9]{1,9}[smhd]", text) else 0
    if not 0 < seconds <= LONGEST_DAYS * UNITS["d"]:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number with its unit, such as 90s, 30m, 12h or 7d, and at most {LONGEST_DAYS}d"
        )
    return seconds


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port: a number from 1 to {LAST_PORT}")
    return int(text)
