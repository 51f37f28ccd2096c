"""What a person sees in the terminal while steps run: one bar a step with the numbers that matter. All of it on stderr."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from stages.run import Event


class Display(Protocol):
    """Hears of steps and their events."""

    def begin(self, step: str, note: str) -> None: ...
    def note(self, step: str, note: str) -> None: ...
    def event(self, step: str, event: Event) -> None: ...
    def end(self, step: str, note: str) -> None: ...


class Quiet:
    """Shows nothing."""

    def begin(self, step: str, note: str) -> None:
        del step, note

    def note(self, step: str, note: str) -> None:
        del step, note

    def event(self, step: str, event: Event) -> None:
        del step, event

    def end(self, step: str, note: str) -> None:
        del step, note


class Terminal:
    """Bars on a terminal; on anything else one line when a step ends."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:<18}"), BarColumn(28), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Terminal:
        global current
        current = self
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        global current
        current = Quiet()
        self.progress.stop()

    def begin(self, step: str, note: str) -> None:
        self.bars[step] = self.progress.add_task(step, total=None, note=note)

    def note(self, step: str, note: str) -> None:
        self.progress.update(self.bars[step], note=note)

    def event(self, step: str, event: Event) -> None:
        if event["event"] == "progress":
            self.progress.update(self.bars[step], completed=event["done"], total=event["total"], note=event["note"])
        elif event["event"] == "message":
            self.console.print(f"{step}: {event['text']}")

    def end(self, step: str, note: str) -> None:
        self.progress.update(self.bars[step], completed=1, total=1, note=note)
        self.progress.stop_task(self.bars[step])
        if self.progress.disable:
            self.console.print(f"{step:<18} {note}", soft_wrap=True)


def print_wide(console: Console, what: RenderableType) -> None:
    """A file or a pipe has no width; the 80 columns that are taken for it would cut names short."""
    if not console.is_terminal:
        console.width = 140
    console.print(what)


current: Display = Quiet()
