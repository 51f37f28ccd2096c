"""Runs programs that nobody has read: one confined process each, under limits that the program cannot lift.

A program may compute, read its stdin and the Python installation, write to its stdout and to files in an empty folder of its
own, and start threads. It has no network, no other files, no other processes, none of the parent's environment.

    limits      CPU and wall time, memory, threads, file and output size, files in its folder, open files; no core dumps
    seccomp     a list of allowed system calls: no new processes, programs, sockets, signals (stages/rewards/syscalls.py)
    landlock    files: reads only of Python and the system's libraries, writes only in its folder; Linux 5.13 and later
    bwrap       bubblewrap: its own file tree, process numbers, network and IPC; it needs user namespaces, or root

`auto` is the best that works here, found by trying: bwrap, else landlock, each with seccomp and the limits. `rlimits` is the
limits, and seccomp where there is libseccomp: a program can then read, and write, what the user can; for trusted programs only.

What remains: a program may use its limits to the full, and as much disk as memory by files that it has removed; under landlock
it can ask whether a file exists, how large and how old it is; a bug of the kernel, which it shares, is a way out. When the
parent is killed, its programs die with it, but their folders stay behind in the folder for temporary files.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from marshal import dumps
from pathlib import Path
from typing import Any, Literal, get_args

from stages.errors import InputError
from stages.rewards.program import Ended, Limits, Program, SandboxError, remove, wait
from stages.rewards.syscalls import seccomp_filter

Isolation = Literal["auto", "bwrap", "landlock", "rlimits"]
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
READABLE = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", sys.base_prefix]
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs, by one isolation."""

    isolation: Literal["bwrap", "landlock", "rlimits"]

    def run(self, source: str, stdin: bytes = b"", limits: Limits | None = None) -> Ended:
        """Run a Python program to its end, or to its limits. Raises SandboxError when it could not be started."""
        return wait(self.start(source, stdin, limits))[0]

    def start(self, source: str, stdin: bytes = b"", limits: Limits | None = None, pipes: Sequence[int] = ()) -> Program:
        """Start a Python program; it inherits the file descriptors `pipes` under their numbers. Raises SandboxError."""
        limits = limits or Limits()
        folder, fds = Path(tempfile.mkdtemp(prefix="posttrain-program-")), []
        try:
            fds = [memory_file(content) for content in (stdin, b"", b"", b"", dumps(self._job(source, folder, limits)))]
            given, stdout, stderr, ready, job = fds
            process = subprocess.Popen(
                [*self._wrapper(folder), PYTHON, "-S", "-s", "-P", "-B", "-c", confine(), str(job), str(ready)],
                stdin=given,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[ready, job, *pipes],
                cwd=folder,
                env=environment(folder),
                start_new_session=True,
            )
        except OSError as error:
            for fd in fds:
                os.close(fd)
            remove(folder)
            raise SandboxError(f"the sandbox could not start a program: {error}") from error
        os.close(given)
        os.close(job)
        return Program(process, limits, folder, (stdout, stderr, ready))

    def _job(self, source: str, folder: Path, limits: Limits) -> dict[str, Any]:
        """What the child is told: see `confine.confine`."""
        try:
            seccomp = seccomp_filter()
        except OSError:
            seccomp = None
        landlock = {"readable": READABLE, "writable": [str(folder)], "devices": DEVICES}
        return {
            "source": source,
            "parent": None if self.isolation == "bwrap" else os.getpid(),
            "landlock": landlock if self.isolation == "landlock" else None,
            "seccomp": seccomp,
            "limits": {
                "AS": limits.memory_mb * 2**20,
                "CPU": math.ceil(limits.seconds) + 1,
                "FSIZE": limits.file_mb * 2**20,
                "NOFILE": 32,
                "CORE": 0,
                "MEMLOCK": 0,
            },
        }

    def _wrapper(self, folder: Path) -> list[str]:
        """The command in front of Python's: bubblewrap's, in which the program is process 1 of a tree of read-only mounts."""
        if self.isolation != "bwrap":
            return []
        user = [] if os.geteuid() == 0 else ["--unshare-user"]
        seen = [word for path in READABLE if Path(path).exists() for word in ("--ro-bind", path, path)]
        devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
        own = ["--bind", str(folder), str(folder), "--chdir", str(folder), "--remount-ro", "/"]
        spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"]
        return ["bwrap", *user, *spaces, "--cap-drop", "ALL", *seen, *devices, *own, "--"]


def memory_file(content: bytes) -> int:
    """A file in memory with this content, at its start: it needs no name that a program could reach."""
    fd = os.memfd_create("program")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@cache
def confine() -> str:
    """The text that the child runs."""
    return resources.files("stages.rewards").joinpath("confine.py").read_text()


def environment(folder: Path) -> dict[str, str]:
    """A program's whole environment: nothing of the parent's; hashes and times are the same in every run."""
    own = {"HOME": str(folder), "TMPDIR": str(folder)}
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0", **own}


PROBE = """
import os, socket
def fork():
    if os.fork() == 0:
        os._exit(0)
tried = {
    "open a socket": socket.socket,
    "read outside its folder": lambda: open(OUTSIDE),
    "write outside its folder": lambda: open(OUTSIDE, "a"),
    "start a process": fork,
    "signal another process": lambda: os.kill(os.getppid(), 0),
}
for what, action in tried.items():
    try:
        action()
    except OSError:
        continue
    print(what)
"""


@cache
def open_sandbox(isolation: Isolation = "auto") -> Sandbox:
    """The sandbox of this isolation, after a program in it has tried what it must not be able to do.

    Raises InputError, which says what to install, when it does not work here or does not hold.
    """
    if isolation not in get_args(Isolation):
        raise InputError(f"no isolation is named {isolation!r}; there are {', '.join(get_args(Isolation))}")
    failed = []
    choices: list[Literal["bwrap", "landlock", "rlimits"]] = ["bwrap", "landlock"] if isolation == "auto" else [isolation]
    for choice in choices:
        if not (why := probe(Sandbox(choice))):
            return Sandbox(choice)
        failed.append(f"{choice}: {why}")
    raise InputError(
        f"programs cannot be confined on this machine ({'; '.join(failed)}). Install bubblewrap and libseccomp2 "
        "(apt-get install bubblewrap libseccomp2), or use a Linux kernel with Landlock (5.13 or later). For programs that you "
        "trust with all that you can read and write, `isolation: rlimits` runs them with limits on time and memory alone"
    )


def probe(sandbox: Sandbox) -> str:
    """Why a sandbox does not hold here; "" when it does."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    with tempfile.NamedTemporaryFile(prefix="posttrain-outside-") as outside:
        try:
            ended = sandbox.run(f"OUTSIDE = {outside.name!r}\n{PROBE}")
        except SandboxError as error:
            return str(error)
    if ended.reason:
        return ended.reason
    possible = ended.stdout.decode().replace("\n", ", ").strip(", ")
    return f"a program can {possible}" if possible and sandbox.isolation != "rlimits" else ""
