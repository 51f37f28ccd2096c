"""Saving and restoring a training loop between steps: weights, optimizer, schedule, every RNG, and what the loop adds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stages.run import Run

# Tied weights are saved once; accelerate warns of it at every state.
logging.getLogger("accelerate.utils").setLevel(logging.ERROR)
logging.getLogger("accelerate.checkpointing").setLevel(logging.ERROR)


def save(
    run: Run,
    accelerator: Accelerator,
    step: int,
    extra: dict[str, Any],
    write: Callable[[Path], None] = lambda _: None,
) -> None:
    """Save a resume state after `step` steps. `extra` is JSON: the loop's own position and controllers; `write`, called on the
    main process with the state's folder, adds files of its own."""
    with run.new_state(step, accelerator.wait_for_everyone) as folder:
        accelerator.save_state(str(folder), safe_serialization=True)
        if accelerator.is_main_process:
            (folder / "loop.json").write_text(json.dumps({"step": step, "threads": torch.get_num_threads(), **extra}))
            write(folder)


def load(run: Run, accelerator: Accelerator) -> dict[str, Any] | None:
    """Restore the newest state into the prepared objects; its `extra`, `step` and `folder`, or None when there is no state.

    The first try's number of threads comes back too: sums over another number of threads differ in their last bits.
    """
    folder = run.load_state()
    if folder is None:
        return None
    accelerator.load_state(str(folder))
    extra = json.loads((folder / "loop.json").read_text())
    torch.set_num_threads(extra["threads"])
    return extra | {"folder": folder}
