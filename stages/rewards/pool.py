"""Worker processes for verifiers, beside the work of this one: what hangs or dies costs its own call, nothing else.

Workers come from a fork server that has never seen torch or a thread, one pool a module, which its workers have imported before
their first call: a timeout counts a call alone. They wait for the next step's calls, and end with this process, however it
ends.
"""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as CallTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

MEMORY = 4 * 2**30  # bytes of address space a worker; an answer such as 10**10**10 would take all there is

_pools: dict[str, ProcessPool] = {}


@dataclass(frozen=True)
class Lost:
    """A call without a result: why, in a word or two."""

    why: str


class Call:
    """A call of the function at `module:name`, which begins at once, or when a worker is free, and is then limited to `timeout`
    seconds."""

    def __init__(self, target: str, timeout: float, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._asked = target, timeout, args, kwargs
        self._future = _schedule(*self._asked)

    def result(self) -> Any:
        """Wait for it: what the function returned, the exception that it raised, or `Lost`."""
        from pebble import ProcessExpired

        for _ in range(2):
            try:
                return self._future.result()
            except CallTimeout:
                return Lost("timeout")
            except ProcessExpired:
                return Lost("died")
            except MemoryError:
                return Lost("out of memory")
            except BrokenProcessPool:  # a worker died between two calls, by no fault of this one
                self._future = _schedule(*self._asked)
            except Exception as error:
                return error
        return Lost("died")

    def cancel(self) -> None:
        """Take it out of the workers' way, whether it waits or works; one that has ended stays as it is."""
        self._future.cancel()


def workers() -> int:
    """Worker processes a pool: one core is left to this process, and the others of its machine have their share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


def _schedule(target: str, timeout: float, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ProcessFuture[Any]:
    from pebble import ProcessPool

    module = target.split(":")[0]
    if module not in _pools or not _pools[module].active:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        _pools[module] = ProcessPool(workers(), initializer=_begin, initargs=(module,), context=context)  # pyright: ignore[reportArgumentType]
    return _pools[module].schedule(_call, (target, args, kwargs), timeout=timeout)


def _begin(module: str) -> None:
    """Make this process a worker."""
    # The parent's end of this pipe closes when it dies, also by kill -9: then the kernel ends a worker, busy or not.
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler in Python would wait for a call that holds the interpreter
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # A worker that does not begin is replaced for ever; what cannot be imported is said by the call that needs it.
    with suppress(Exception):
        importlib.import_module(module)


def _call(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    module, name = target.split(":")
    try:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)
    except Exception:
        raise
    except BaseException:  # SystemExit and its like are to end this process, not the one that waits
        os._exit(1)
