"""Progress on stderr: bars on a terminal, one line a stage in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

TITLES = {
    "start": "Start the libraries",
    "load": "Load the model",
    "reference": "Run the original",
    "golden": "Run the original",
    "compress": "Compress",
    "lower": "Lower for the target",
    "baseline": "Lower the fp32 baseline",
    "validate": "Measure the file",
    "bundle": "Write the bundle",
    "bytes": "Read the file's bytes",
    "layers": "Compare layers",
    "sensitivity": "Weigh each layer",
    "flips": "Look for flips",
    "against": "The other bundle",
    "folder": "Write the folder",
}
"""What each stage of `edgeport.pipeline` is called here. Other names are shown as they are."""

SECONDS_BETWEEN_LINES = 10.0
"""How often a stage reports in a log, at most."""


class Watcher(Protocol):
    """What a run reports to (`edgeport.progress.Progress`)."""

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """The stage got this far."""

    def message(self, text: str) -> None:
        """One line worth keeping."""


class Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self.stream = stream
        self.clock = clock
        self.began = self.last = clock()

    def _line(self, text: str) -> None:
        self.last = self.clock()
        print(f"[{self.last - self.began:6.1f} s] {text}", file=self.stream, flush=True)

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins."""
        self._line(TITLES.get(name, name) + (f": {detail}" if detail else ""))

    def update(self, done: int, total: int, detail: str = "") -> None:
        """The stage got this far; said at most every ten seconds."""
        if self.clock() - self.last >= SECONDS_BETWEEN_LINES:
            self._line(f"  {done}/{total} {detail}".rstrip())

    def message(self, text: str) -> None:
        """One line worth keeping."""
        self._line(text)


class Bars:
    """Progress as one bar a stage, for terminals."""

    def __init__(self, bars: Progress, console: Console) -> None:
        self.bars = bars
        self.console = console

    def _finish(self) -> None:
        for task in self.bars.tasks:
            if not task.finished:
                total = task.total or 1
                self.bars.update(task.id, total=total, completed=total)

    def stage(self, name: str, detail: str = "") -> None:
        """Close the last stage's bar, and open one that pulses until `update` says how far it is."""
        from rich.markup import escape

        self._finish()
        self.bars.add_task(TITLES.get(name, name), total=None, detail=escape(detail))

    def update(self, done: int, total: int, detail: str = "") -> None:
        """The stage got this far."""
        from rich.markup import escape

        if self.bars.tasks:
            task = self.bars.tasks[-1]
            self.bars.update(task.id, completed=done, total=max(total, 1))
            if detail:
                self.bars.update(task.id, detail=escape(detail))

    def message(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        """The last stage came to its end."""
        self._finish()


@contextlib.contextmanager
def watch(stream: TextIO, clock: Callable[[], float]) -> Iterator[Watcher]:
    """The right kind of progress for a stream.

    Args:
        clock: seconds, growing.
    """
    if not stream.isatty():
        yield Lines(stream, clock)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=stream)
    columns = (
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}[/dim]"),
    )
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        bars = Bars(progress, console)
        yield bars
        bars.end()
