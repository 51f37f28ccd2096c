"""One step of a pipeline on a work pool: what `tasks.dispatch` sends and a worker of the pool runs."""

from __future__ import annotations

from prefect import flow

from stages.errors import InputError
from tasks import display
from tasks.execute import bring
from tasks.home import configure_environment
from tasks.lease import own_gpus
from tasks.live import Live
from tasks.plan import StepCall


@flow(name="step", flow_run_name="{call.name}", persist_result=False)
def step(call: StepCall, key: str) -> None:
    """Bring a step to its published outputs. Raises InputError when this machine's code would compute another key.

    Args:
        call: The step, with handles of its inputs.
        key: What the pipeline's side expects.
    """
    if call.key() != key:
        raise InputError(
            f"{call.name}: this worker's code computes the key {call.key()[:12]}, the pipeline expects {key[:12]}: "
            "the two run different versions of posttrain; update one of them"
        )
    display.current = Live()

    def waiting(owner: str) -> None:
        display.current.note(call.name, f"another step has the GPUs; waiting for its end ({owner})")

    # A worker that was started again knows nothing of the step that goes on from before.
    with own_gpus(configure_environment() / "leases", waiting):
        bring(call)
