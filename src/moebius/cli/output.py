"""Where text goes: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from moebius.progress import Progress, Silent
from moebius.report.tables import TextTable, size


def print_json(values: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(values, indent=1))


def print_tables(*tables: TextTable) -> None:
    """Tables on stdout."""
    console = _console()
    for table in tables:
        console.print(table.rich())


def _console(stderr: bool = False) -> Console:
    """A console that is at least 120 columns wide where nobody's terminal sets a limit."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


def note(message: str) -> None:
    """A line on stderr."""
    typer.echo(message, err=True)


@contextmanager
def progress_bars(hidden: bool) -> Iterator[Progress]:
    """Bars on stderr with the step, the time left and the memory in use; nothing if ``hidden``."""
    if hidden:
        yield Silent()
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.finish()


class Bars:
    """A :class:`moebius.progress.Progress` with one bar per stage."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._bars: RichProgress | None = None
        self._task: Any = None

    def stage(self, name: str, total: int) -> None:
        if self._bars is None:
            self._bars = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
                TextColumn("[dim]{task.fields[detail]}"),
                console=_console(stderr=True),
            )
            self._bars.start()
        self._end_task()
        self._task = self._bars.add_task(escape(name), total=total, detail="", memory=self._memory())

    def advance(self, detail: str = "") -> None:
        if self._bars is not None:
            self._bars.update(self._task, advance=1, detail=escape(detail), memory=self._memory())

    def finish(self) -> None:
        if self._bars is not None:
            self._end_task()
            self._bars.stop()
            self._bars = self._task = None

    def _end_task(self) -> None:
        """A finished stage keeps its bar and its time, and loses the name of its last step."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, detail="", memory=self._memory())
            self._bars.stop_task(self._task)

    def _memory(self) -> str:
        return size(self._process.memory_info().rss)
