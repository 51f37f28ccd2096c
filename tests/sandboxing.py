"""What the tests of the sandbox share: every isolation that works here, and programs that try what they must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from stages.errors import InputError
from stages.rewards.program import Ended, Limits
from stages.rewards.sandbox import Sandbox, open_sandbox

ISOLATIONS = ["bwrap", "landlock"]
MB = 2**20

ATTEMPTS = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def system(number, *args):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
outcomes = {}
for name, action in ACTIONS.items():
    try:
        exec(action, {**GIVEN, "system": system, "__builtins__": __builtins__})
    except OSError:
        outcomes[name] = "refused"
    except BaseException as error:
        outcomes[name] = repr(error)
    else:
        outcomes[name] = "escaped"
print(json.dumps(outcomes))
"""


@cache
def opened(isolation: Any) -> Sandbox | str:
    """The sandbox, or why there is none here."""
    if isolation == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        return open_sandbox(isolation)
    except InputError as error:
        return str(error)


@cache
def proven(isolation: str) -> Sandbox:
    """A sandbox in which a bomb is no danger: it has refused 50 forks, 300 MB above its memory, and signal 0 to everyone."""
    sandbox = opened(isolation)
    if isinstance(sandbox, str):
        assert "a program can" not in sandbox, "it works here, but does not hold"
        pytest.skip(sandbox)
    actions = {f"fork {number}": "import os\nif os.fork() == 0: os._exit(0)" for number in range(50)}
    actions |= {"everyone": "import os; os.kill(-1, 0)", "parent": "import os; os.kill(os.getppid(), 0)"}
    outcomes = attempt(sandbox, actions)
    assert set(outcomes.values()) == {"refused"}, outcomes
    ended = sandbox.run("x = bytearray(300 * 2**20)", limits=Limits(memory_mb=200))
    assert "MemoryError" in ended.reason
    return sandbox


def attempt(sandbox: Sandbox, actions: Mapping[str, str], **given: Any) -> dict[str, str]:
    """What became of each action: "refused", "escaped", or another error than the operating system's."""
    ended = sandbox.run(f"ACTIONS = {dict(actions)!r}\nGIVEN = {given!r}\n{ATTEMPTS}")
    assert not ended.reason, ended.reason
    return json.loads(ended.stdout)


def run(sandbox: Sandbox, source: str, stdin: bytes = b"", **limits: Any) -> Ended:
    return sandbox.run(source, stdin, Limits(**{"seconds": 5.0, **limits}))
