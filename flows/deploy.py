"""Work pools, deployments and automations on a Prefect server. Doing it again changes nothing.

    control     pipelines: they wait for their steps, so that a waiting one never holds a slot that its own step needs
    cpu, gpu    steps, as `tasks.dispatch` sends them: the deployments step/cpu and step/gpu

Every flow and every single stage is a deployment of its own name on `control`: its form in Prefect's page starts it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import Flow, get_client

# What the server computes times with.
from prefect._vendor.croniter import CroniterBadDateError, croniter
from prefect.automations import Automation
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments import run_deployment
from prefect.deployments.runner import RunnerDeployment
from prefect.events import ChangeFlowRunState, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from flows.cli import PIPELINES
from flows.control import POOLS
from flows.forms import parameters
from flows.job_templates import template
from flows.pool_file import CONTROL, Pool, PoolFile, ProcessPool, Servers
from flows.recipe import Recipe
from flows.step import step
from stages.errors import InputError
from stages.specs import STAGES
from tasks.home import OURS_TAG

PIPELINE_TAG = "pipeline"
# A flow run tells every 30 s that it lives.
SILENCE = timedelta(seconds=90)
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
CRON_FIELDS = 5
CRON = "must be five fields, minute, hour, day, month and weekday, such as '30 7 * * mon-fri', or a word such as @daily"


def deploy(directory: Path, file: PoolFile, servers: Servers) -> list[str]:
    """Make or update all of it; the names of the deployments. Pipelines run in `directory`, where recipes' paths begin.

    Pools of `file` are on the platforms that it says; their jobs find the servers at these addresses.
    """
    pools = make_pools(directory, file, servers)
    made = [deployment(flow, name) for name, flow in flows()]
    made += [on_pool(step, pool, name=pool, tags=[OURS_TAG]) for pool in pools if pool != CONTROL]
    for one in made:
        one.apply()
    _ensure(automation())
    return [f"{one.flow_name}/{one.name}" for one in made]


def flows() -> Iterator[tuple[str, Flow[..., Any]]]:
    """Every flow that a person starts, by name."""
    for name in PIPELINES:
        yield name, importlib.import_module(f"flows.{name}").DEFINITION.flow
    single = importlib.import_module("flows.single")
    for name in STAGES:
        yield name, single.definition(name).flow


def make_pools(directory: Path, file: PoolFile, servers: Servers) -> list[str]:
    """Make or update the pools, and return their names. One that moves to another platform is made anew, without its queue."""
    own = {name: ProcessPool(type="process", description=description) for name, description in POOLS.items()}
    every: dict[str, Pool] = {**own, **file.pools}
    with get_client(sync_client=True) as client:
        platforms = {found.name: found.type for found in client.read_work_pools()}
        for name, pool in every.items():
            if platforms.get(name, pool.type) != pool.type:
                client.delete_work_pool(name)
            made = WorkPoolCreate(
                name=name,
                type=pool.type,
                description=pool.description or POOLS.get(name),
                base_job_template=template(pool, servers, directory if name == CONTROL else None),
            )
            client.create_work_pool(made, overwrite=True)
    return list(every)


def deployment(
    flow: Flow[..., Any], name: str, recipe: Recipe | None = None, schedule: Schedule | None = None
) -> RunnerDeployment:
    """A pipeline's deployment, its form filled in from a recipe; a schedule's run is skipped while the one before goes on."""
    given = {} if recipe is None else parameters(recipe)
    limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW) if schedule else None
    fields = {"parameters": given, "schedule": schedule, "concurrency_limit": limit}
    return on_pool(flow, CONTROL, name=name, tags=[OURS_TAG, PIPELINE_TAG], **fields)


def check_cron(text: str) -> None:
    """Raise InputError when `--cron` is no schedule that the server's scheduler can follow, or one whose time never comes."""
    # Prefect would take a sixth and a seventh field, for seconds and years: where others have seconds first, it has them last.
    if not text.isascii() or (len(text.split()) != CRON_FIELDS and not text.startswith("@")):
        raise InputError(f"--cron {text!r}: {CRON}")
    try:
        CronSchedule(cron=text)
    except ValueError as error:
        raise InputError(f"--cron {text!r}: {CRON}, each within its range") from error
    try:
        croniter(text).get_next()
    except CroniterBadDateError as error:
        raise InputError(f"--cron {text!r}: no such time ever comes; look at its day and month") from error


def deploy_recipe(flow: Flow[..., Any], recipe: Recipe, every: timedelta | None = None, cron: str | None = None) -> str:
    """Make a recipe a deployment of its name, run by the schedule if there is one; its full name."""
    schedule = None
    if every is not None:
        schedule = Schedule(interval=every)
    elif cron is not None:
        schedule = Schedule(cron=cron)
    made = deployment(flow, recipe.name, recipe, schedule)
    made.apply()
    return f"{made.flow_name}/{made.name}"


def start(flow: Flow[..., Any], recipe: Recipe, from_step: str | None = None, **texts: str) -> str:
    """Start a recipe on the pool `control`; the address of its flow run's page."""
    run = run_deployment(f"{flow.name}/{flow.name}", parameters=parameters(recipe, from_step) | texts, timeout=0)
    assert isinstance(run, FlowRun)
    return url_for(run) or str(run.id)


def on_pool(flow: Flow[..., Any], pool: str, **fields: Any) -> RunnerDeployment:
    """A deployment whose code is found by its module: by a path, `flows/` would be first among what is imported."""
    return RunnerDeployment.from_flow(flow, work_pool_name=pool, entrypoint_type=EntrypointType.MODULE_PATH, **fields)


def automation() -> Automation:
    """What the server does by itself for a flow run whose machine is lost: what else is lost `flows.keeper` finds there."""
    ours = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{OURS_TAG}"})
    beats = "prefect.flow-run.heartbeat"
    silent = EventTrigger(
        # Also of a run that is lost before its first sign of life.
        after={beats, "prefect.flow-run.Running"},
        expect={beats, *(f"prefect.flow-run.{end}" for end in ENDS)},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ours,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    message = f"No sign of life for {SILENCE.seconds} s"
    return Automation(
        name="posttrain: a flow run that is silent has crashed",
        description="Nobody else tells of a run whose machine is lost.",
        trigger=silent,
        actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=message, force=False)],
    )


def _ensure(automation: Automation) -> None:
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(automation.name)
    if not found:
        automation.create()
        return
    kept = found[0]
    # An update makes the server forget what it is waiting for, so that who is silent already would stay Running for ever.
    if all(_plain(getattr(kept, name)) == _plain(getattr(automation, name)) for name in ("enabled", "trigger", "actions")):
        return
    automation.id = kept.id
    automation.update()


def _plain(value: Any) -> Any:
    """Without the ids that a server gives."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.model_dump(exclude={"id"}) if isinstance(value, BaseModel) else value
