"""Child processes that die with this one, and are started again when they die by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tasks.launch import die_with_parent

POLL_SECONDS = 0.5
# One that dies soon after its start is started after a pause, which doubles up to this.
LONGEST_PAUSE = 30.0
STOP_SECONDS = 45.0


def spawn(command: Sequence[str], settings: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command with these settings in its environment, its output behind what is in its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
            # A terminal's ctrl-C goes to the whole group: who ends when is this process's to say.
            process_group=0,
        )


@dataclass
class Child:
    """A server or a worker that is kept alive."""

    name: str
    command: list[str]
    settings: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0

    def start(self) -> None:
        self.process, self.started = spawn(self.command, self.settings, self.log), time.monotonic()

    def tend(self) -> str | None:
        """Start it again when it has ended and its pause is over; in words, that it has ended."""
        now, said = time.monotonic(), None
        if self.process is None or self.process.poll() is None:
            return None
        ended = self.process.returncode
        if self.pause == 0.0 or now - self.started > 2 * LONGEST_PAUSE:
            self.pause = 1.0
            said = f"{self.name} ended with {ended} and is started again; its log is {self.log}"
        if now - self.started > self.pause:
            self.start()
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return said

    def stop(self) -> None:
        """Ask it to end; kill it when it takes too long."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Stopped(BaseException):
    """A signal asks for the end."""


@contextmanager
def until_stopped() -> Iterator[None]:
    """SIGINT and SIGTERM end the block, without an error."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stopped:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_alive(children: Sequence[Child], say: Callable[[str], None]) -> None:
    """Tend children for ever, telling of each that has died."""
    while True:
        for child in children:
            if said := child.tend():
                say(said)
        time.sleep(POLL_SECONDS)
