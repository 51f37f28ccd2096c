"""What every flow's body does around its steps: resolve inputs once, run, check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from prefect import Flow, get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from rich.console import Console

from flows.recipe import Recipe, near
from stages.artifacts import Dataset, Model
from stages.errors import InputError
from tasks import display
from tasks.dispatch import step_pools
from tasks.execute import StepResult
from tasks.home import configure_environment, server
from tasks.live import Live, Table
from tasks.pipeline import Pipeline, resolve_inputs
from tasks.store import Store

LOSSES = 5

R = TypeVar("R", bound=Recipe)
Steps = Callable[[Pipeline, R], None]


@dataclass(frozen=True)
class Definition:
    """What the command needs of a flow: how its recipe is read, how it is run, how it is planned; `plan` where that takes more
    than the steps, and `report`, which shows what a run leaves besides its steps and returns it for `--json`."""

    recipe: type[Recipe]
    flow: Flow[..., Any]
    steps: Callable[..., Any]
    plan: Callable[[Any, str | None], Pipeline] | None = None
    report: Callable[[Console, Any], dict[str, Any]] | None = None


def run_pipeline(recipe: R, steps: Steps[R], from_step: str | None = None) -> list[StepResult]:
    """Run a recipe's steps inside a Prefect flow run."""
    store = Store(configure_environment())
    # A pipeline that takes its process down each time must not be started for ever.
    losses()
    check_pools(recipe)
    pipeline_id = str(flow_run.id)
    inputs = resolve_inputs(store, recipe.name, recipe.references(), pipeline_id)
    # A missing input or an unknown step shows here, before anything is computed.
    _plan(store, recipe, steps, inputs, from_step)
    pipeline = begun(recipe, store, inputs, pipeline_id, from_step)
    steps(pipeline, recipe)
    return pipeline.results


def begun(
    recipe: Recipe, store: Store, inputs: Mapping[str, Dataset | Model], pipeline_id: str, from_step: str | None
) -> Pipeline:
    """A pipeline that runs its steps; with servers, in sight of Prefect's page."""
    pipeline = Pipeline(recipe.name, store, inputs, pipeline_id, recipe.launch, recipe.pools.of, from_step=from_step)
    if server() is not None:
        pipeline.tell = Table(store, recipe.name)
        if isinstance(display.current, display.Quiet):
            display.current = Live()
    return pipeline


def losses() -> int:
    """How often this flow run's process was lost since it was last begun by somebody. Raises RuntimeError when that was again
    and again: starting it once more would not help."""
    if server() is None:
        return 0
    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(UUID(str(flow_run.id))), key=lambda state: state.timestamp)
    lost = 0
    for state in states:
        # A person who starts a failed run again has it begin anew.
        lost = 0 if state.type == StateType.FAILED else lost + (state.type == StateType.CRASHED)
    if lost >= LOSSES:
        raise RuntimeError(f"its process was lost {lost} times; look in the workers' logs why, then start it again")
    return lost


def check_pools(recipe: Recipe) -> None:
    """Raise InputError when servers are used and a pool that the recipe names takes no steps there: the step that is to go to
    it may come hours later."""
    named = {field: pool for field, pool in dict(recipe.pools).items() if pool}
    if not named or server() is None:
        return
    with get_client(sync_client=True) as client:
        pools = step_pools(client)
    for field, pool in named.items():
        if pool not in pools:
            raise InputError(f"pools.{field}: no work pool that takes steps is named {pool}{near(pool, pools)}")


def plan_pipeline(recipe: R, steps: Steps[R], from_step: str | None = None) -> Pipeline:
    """What running a recipe would do now. Starts no server and computes nothing."""
    store = Store(configure_environment())
    return _plan(store, recipe, steps, resolve_inputs(store, recipe.name, recipe.references(), None), from_step)


def _plan(store: Store, recipe: R, steps: Steps[R], inputs: Mapping[str, Dataset | Model], from_step: str | None) -> Pipeline:
    pipeline = Pipeline(recipe.name, store, inputs, "", recipe.launch, only_plan=True, from_step=from_step)
    steps(pipeline, recipe)
    pipeline.check_from_step()
    return pipeline
