"""What people and programs see: tables and one JSON document on stdout, progress and notes on stderr.

On a terminal both are drawn by rich; in a pipe they are plain, aligned text. rich is imported only when it draws.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

Cell = str | int | float | None


class Progress(Protocol):
    """How long work reports itself: a line for the stage, and how far it is when that is known."""

    def __call__(self, message: str, done: float | None = None, total: float | None = None) -> None: ...


def quiet(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


@dataclass(frozen=True)
class Table:
    """Columns are headings; numbers are aligned right, None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())

    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers (and dashes) only and is aligned right."""
        numbers = (int, float)
        return [
            any(isinstance(row[i], numbers) for row in self.rows)
            and all(row[i] is None or isinstance(row[i], numbers) for row in self.rows)
            for i in range(len(self.columns))
        ]


def cell(value: Cell) -> str:
    """One value as text: three significant digits below 100, whole numbers above."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.2g}"


def leads() -> bool:
    """Whether this process speaks: of several that train together (torchrun, accelerate), only the first."""
    return os.environ.get("RANK", "0") == "0"


class Screen:
    """Where a command's result goes. ``out`` is the real stdout, taken before it is redirected to stderr."""

    def __init__(self, out: TextIO | None = None, *, as_json: bool = False) -> None:
        self.out = out if out is not None else sys.stdout
        self.as_json = as_json

    def document(self, document: object, tables: Iterable[Table] = ()) -> None:
        """Print the JSON document, or the tables when people are reading."""
        if self.as_json and leads():
            text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False)
            print(text, file=self.out, flush=True)
        self.show(*tables)

    def show(self, *tables: Table) -> None:
        """Print tables for people; a program that asked for JSON does not get them."""
        if self.as_json or not leads():
            return
        draw = _draw_rich if self.out.isatty() else _draw_plain
        for table in tables:
            draw(table, self.out)
        self.out.flush()

    def piece(self, text: str) -> None:
        """Some of a line for people, at once."""
        if not self.as_json and leads():
            print(text, end="", file=self.out, flush=True)

    def line(self, text: str) -> None:
        """One line for people; a program that asked for JSON does not get it."""
        if not self.as_json and leads():
            print(text, file=self.out, flush=True)


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: a number that could not be computed is null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw_plain(table: Table, out: TextIO) -> None:
    rows = [[cell(value) for value in row] for row in table.rows]
    print(table.title, file=out)
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    right = table.numeric()
    for row in [list(table.columns), *rows] if table.columns else []:
        cells = (
            text.rjust(width) if at_right else text.ljust(width)
            for text, width, at_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(cells).rstrip(), file=out)
    for note in table.notes:
        print(note, file=out)
    print(file=out)


def _draw_rich(table: Table, out: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    drawn = RichTable(title=escape(table.title), box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading, at_right in zip(table.columns, table.numeric(), strict=True):
        drawn.add_column(escape(heading), justify="right" if at_right else "left")
    for row in table.rows:
        drawn.add_row(*(escape(cell(value)) for value in row))
    console = Console(file=out, highlight=False)
    console.print(drawn if table.columns else escape(table.title))
    for note in table.notes:
        console.print(escape(note))


@contextlib.contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Progress on stderr: one live bar on a terminal; in a pipe a line per stage and one every ten seconds."""
    err = stream if stream is not None else sys.stderr
    if not leads():
        yield lambda message, done=None, total=None: None
        return
    if not err.isatty():
        yield _Lines(err)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(file=err), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def report(message: str, done: float | None = None, total: float | None = None) -> None:
            bars.update(task, description=message, completed=done or 0, total=total)

        yield report


class _Lines:
    """Progress as plain lines: every new message once, and a long stage's position now and then."""

    every_s = 10.0

    def __init__(self, err: TextIO) -> None:
        self.err = err
        self.message = ""
        self.shown_at = 0.0

    def __call__(self, message: str, done: float | None = None, total: float | None = None) -> None:
        now = time.monotonic()
        if message == self.message and now - self.shown_at < self.every_s:
            return
        position = f" {100 * done / total:.0f} %" if done and total else ""
        print(f"{message}{position}", file=self.err, flush=True)
        self.message, self.shown_at = message, now


class _WarningLine(logging.Handler):
    """A warning as one line on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        if not leads():
            return
        print(f"compexport: warning: {' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_on_stderr(*packages: str) -> Iterator[None]:
    """Show what these packages log as warnings while a command runs."""
    handler = _WarningLine(logging.WARNING)
    loggers = [logging.getLogger(name) for name in packages]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
