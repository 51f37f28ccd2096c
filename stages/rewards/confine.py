"""What a sandboxed program's own process does before the program: it gives up everything that it can, then runs the source.

This text is run by `python -c` in the child (stages/rewards/sandbox.py): it imports nothing of this project, and little else,
since every program waits for it. A failure here is the sandbox's, not the program's: it is written to the `ready` file, which
is closed before the program starts.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import stat
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
# Rights to read files and list folders; to write and truncate files; those of both that a single file can have.
READ, WRITE, ON_FILES = 1 << 2 | 1 << 3, 1 << 1 | 1 << 14, 1 << 1 | 1 << 2 | 1 << 14
# How many access rights on files each version of Landlock knows: 13 at first, then REFER, TRUNCATE and IOCTL_DEV.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> int:
    """A C function's result. Raises OSError when it failed."""
    result = getattr(libc, name)(*[ctypes.c_long(one) if isinstance(one, int) else one for one in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def limit(limits: dict[str, int]) -> None:
    """Resource limits by name, soft and hard, never above what the process has."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock(readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Everything on files is refused but: reading below `readable`, anything below `writable`, and using `devices`.

    Landlock of the kernel's documentation, userspace-api/landlock.rst. Raises OSError on a kernel without it.
    """
    version = call("syscall", LANDLOCK_CREATE_RULESET, None, 0, 1)
    handled = (1 << RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("Q", handled)
    rules = call("syscall", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    for paths, allowed in ((readable, READ), (writable, handled), (devices, (READ | WRITE) & handled)):
        for path in paths:
            try:
                parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # not every system has every folder
            rights = allowed if stat.S_ISDIR(os.fstat(parent).st_mode) else allowed & ON_FILES
            call("syscall", LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, parent), 0)
            os.close(parent)
    call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def drop_capabilities() -> None:
    """Even root keeps none; without execve and with no_new_privs it gets none back."""
    version_3 = struct.pack("Ii", 0x20080522, 0)
    call("capset", version_3, bytes(24))


def seccomp(program: bytes) -> None:
    """Install a filter, as an array of `struct sock_filter` (stages/rewards/syscalls.py)."""
    array = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(array))
    call("prctl", PR_SET_SECCOMP, 2, filter_program)


def confine(job: dict[str, Any]) -> None:
    """Give up all that the job does not leave. Raises OSError when the kernel does not know a protection."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if job["parent"] not in (None, os.getppid()):
        os._exit(1)  # the parent died before it could be followed
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(job["limits"])
    if job["landlock"] is not None:
        landlock(**job["landlock"])
    drop_capabilities()
    if job["seccomp"] is not None:
        seccomp(job["seccomp"])


def main() -> None:
    """Read the job, be confined, say so, run its source as `__main__`."""
    job_fd, ready_fd = map(int, sys.argv[1:])
    with os.fdopen(job_fd, "rb") as file:
        job = marshal.loads(file.read())
    with os.fdopen(ready_fd, "wb", buffering=0) as ready:
        try:
            confine(job)
        except BaseException as error:
            ready.write(f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        ready.write(b"ready")
    sys.argv = ["program.py"]
    program = type(sys)("__main__")
    sys.modules["__main__"] = program
    exec(compile(job["source"], "program.py", "exec", dont_inherit=True), program.__dict__)


if __name__ == "__main__":
    main()
