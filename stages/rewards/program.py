"""A running program of the sandbox: its limits, how it is watched and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select

from stages.errors import InputError

TICK = 0.05
"""Seconds between two looks at what no kernel limit counts: a program's threads and the files in its folder."""


class SandboxError(RuntimeError):
    """The sandbox itself failed: it says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """`seconds` bounds wall time and CPU time alike; `file_mb` is for each file and each output, and for a program's folder in
    all. Threads and the folder are looked at every TICK, the others are held by the kernel."""

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    threads: int = 64
    files: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InputError(f"a program's limit {name!r} must be a number above 0, not {value!r}")


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status (negative: the signal that killed it), why it was stopped ("" when it ended by
    itself), and what it wrote."""

    status: int
    stopped: str
    stdout: bytes
    stderr: bytes

    @property
    def reason(self) -> str:
        """What went wrong, in words; "" when nothing did."""
        if self.stopped:
            return self.stopped
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        last = self.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1][-200:]
        return f"exit status {self.status}: {last}" if self.status else ""


@dataclass
class Program:
    """A running program; `wait` for it. `files` are the descriptors of its stdout, its stderr and the file in which its process
    says that it is confined."""

    process: subprocess.Popen[bytes]
    limits: Limits
    folder: Path
    files: tuple[int, int, int]
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limits.seconds

    def stop(self) -> None:
        """Kill it and whatever it started, and remove its folder."""
        # Until its leader has been waited for, a process group's number is not given to another.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        remove(self.folder)

    def read(self) -> list[bytes]:
        """What is in its files; they are closed."""
        try:
            return [os.pread(fd, os.fstat(fd).st_size, 0) for fd in self.files]
        finally:
            for fd in self.files:
                os.close(fd)

    def excess(self) -> str:
        """Which limit is exceeded that the kernel does not hold; "" when none is."""
        if time.monotonic() >= self.deadline:
            return f"not done after {self.limits.seconds:g} s"
        if threads(self.process.pid) > self.limits.threads:
            return f"more than {self.limits.threads} threads"
        number, size = usage(self.folder, self.limits.files)
        if number > self.limits.files or size > self.limits.file_mb * 2**20:
            return f"more than {self.limits.files} files or {self.limits.file_mb} MB in its folder"
        return ""


def wait(*programs: Program) -> list[Ended]:
    """Wait until the first of them ends, or until one exceeds its limits; then end them all. Raises SandboxError when one of
    them did not get as far as to be confined."""
    stopped = ""
    pidfd = os.pidfd_open(programs[0].process.pid)
    try:
        while not stopped and not select([pidfd], [], [], _pause(programs))[0]:
            stopped = next(filter(None, (program.excess() for program in programs)), "")
    finally:
        os.close(pidfd)
        for program in programs:
            program.stop()
        written = [program.read() for program in programs]
    for _, stderr, ready in written:
        if ready != b"ready":
            why = (ready or stderr).decode(errors="replace").strip() or stopped
            raise SandboxError(f"the sandbox could not start a program: {why}")
    return [
        Ended(program.process.returncode, stopped, stdout, stderr)
        for program, (stdout, stderr, _) in zip(programs, written, strict=True)
    ]


def _pause(programs: tuple[Program, ...]) -> float:
    return max(0.0, min(TICK, *(program.deadline - time.monotonic() for program in programs)))


def threads(pid: int) -> int:
    """Threads of a process and of its descendants."""
    total, front = 0, [pid]
    while front:
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            tasks = list(Path(f"/proc/{front.pop()}/task").iterdir())
            total += len(tasks)
            front += [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return total


def usage(folder: Path, enough: int) -> tuple[int, int]:
    """Files and folders below a folder, counted until there are more than enough, and their bytes on disk. A folder that cannot
    be looked into, for its mode or the length of its path, is more than enough."""
    number, size, front = 0, 0, [str(folder)]
    while front and number <= enough:
        try:
            with os.scandir(front.pop()) as entries:
                for entry in entries:
                    number += 1
                    with suppress(FileNotFoundError):  # removed meanwhile
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        front.append(entry.path)
                    if number > enough:
                        break
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed meanwhile
        except OSError:
            return enough + 1, size
    return number, size


def remove(folder: Path) -> None:
    """Remove a folder in which a program has written."""
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():  # folders nested deeper than Python recurses, or without permissions
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], check=False, stderr=subprocess.DEVNULL)
