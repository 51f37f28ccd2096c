"""A stage's request, and how it is run: the same in process, in a child process, on another machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from stages.errors import InputError
from stages.run import Listener, Run
from stages.specs import STAGES


class InputFolder(BaseModel):
    """An input as a stage gets it: a local folder and the digest that identifies its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    digest: str


class Request(BaseModel):
    """All that a stage needs: resolved config, input folders, its run's folder, the key that the asking side computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    config: dict[str, Any]
    inputs: dict[str, InputFolder]
    folder: Path
    key: str


def run_stage(request: Request, listener: Listener | None = None) -> Run:
    """Run a stage to its end. Raises InputError when this code would compute another key than the request expects."""
    spec = STAGES.get(request.stage)
    if spec is None:
        raise InputError(f"no stage is named {request.stage!r}; there are {', '.join(STAGES)}")
    config = spec.config.model_validate(request.config)
    key = spec.key(config, {name: given.digest for name, given in request.inputs.items()})
    if key != request.key:
        raise InputError(
            f"{request.stage}: this machine's code computes the key {key[:12]}, the request expects {request.key[:12]}: "
            "the two sides run different versions of posttrain; update one of them"
        )
    run = Run(request.folder, spec.outputs, key=key, listener=listener)
    stage = getattr(importlib.import_module(f"stages.{request.stage}"), request.stage)
    stage(config, run, **{name: given.path for name, given in request.inputs.items()})
    run.done()
    return run
