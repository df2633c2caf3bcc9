"""What a command shows: JSON or tables on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from rotquant_tvm.cli.stop_signals import raise_if_stopped
from rotquant_tvm.cli.streams import Streams

Advance: TypeAlias = Callable[[str], None]
"""Tells a progress bar that its next step begins, by name."""


class Output:
    """The two streams of one command.

    ``as_json``: standard output gets one document and nothing else, what ``result`` and ``failed`` were given, when
    ``finish`` is called. ``verbosity``: how many -v were given; below 0 nothing but errors goes to standard error.
    ``document``: what ``result`` was given, or None.
    """

    def __init__(self, streams: Streams, as_json: bool, verbosity: int) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        self.streams = streams
        self.document: dict[str, Any] | None = None
        self._out = _console(streams.out)
        self._err = _console(streams.err)

    def result(self, document: dict[str, Any], *shown: Table | str) -> None:
        """Write the command's result: ``document`` with --json, else the tables and lines ``shown``."""
        self.document = document
        if not self.as_json:
            for part in shown:
                _print(self._out, part)

    def failed(self, kind: str, message: str, status: int) -> None:
        """Add to the command's document how it failed."""
        error = {"kind": kind, "message": message, "exit_status": status}
        self.document = (self.document or {}) | {"error": error}

    def finish(self) -> None:
        """Write the document with --json, if there is one, and flush standard output."""
        if self.as_json and self.document is not None:
            text = json.dumps(_plain(self.document), indent=1, ensure_ascii=False, default=str, allow_nan=False)
            self.streams.out.write(text + "\n")
        self.streams.out.flush()

    def text(self, piece: str) -> None:
        """Write a piece of text to standard output as it is; nothing with --json."""
        if not self.as_json:
            self.streams.out.write(piece)
            self.streams.out.flush()

    def note(self, part: Table | str) -> None:
        """Write a line or a table to standard error; nothing with --quiet."""
        if self.verbosity >= 0:
            _print(self._err, part)

    def detail(self, line: str) -> None:
        """Write a line to standard error at -v."""
        if self.verbosity > 0:
            self.note(line)

    def error(self, message: str) -> None:
        """Write the one ``error:`` line."""
        self.streams.err.write(f"error: {' '.join(message.split())}\n")
        self.streams.err.flush()

    @contextmanager
    def steps(self, total: int | None, first: str) -> Iterator[Advance]:
        """Show progress through ``total`` named steps (None: their number is not known) until the block ends.

        A bar with a clock on a terminal; elsewhere one line per step. A step raises what a signal raised that was lost.
        """
        if not self._err.is_terminal or self.verbosity < 0:
            yield self._lines(first)
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
        columns += [MofNCompleteColumn()] if total else []
        bar = Progress(
            *columns,
            TimeElapsedColumn(),
            console=self._err,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with bar:
            task = bar.add_task(first, total=total)
            started = [False]

            def advance(name: str) -> None:
                raise_if_stopped()
                bar.update(task, description=name, advance=int(started[0]))
                started[0] = True

            yield advance

    def _lines(self, first: str) -> Advance:
        since = time.perf_counter()
        last = [first]
        self.note(f"{first} …")

        def advance(name: str) -> None:
            raise_if_stopped()
            if name != last[0]:
                self.note(f"{name} … ({time.perf_counter() - since:.0f} s)")
            last[0] = name

        return advance


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON has not: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console(stream: TextIO) -> Console:
    # Tables in files and pipes are as wide as they need to be: cut ones are of no use there.
    return Console(file=stream, highlight=False, emoji=False, width=None if stream.isatty() else 300)


def _print(console: Console, part: Table | str) -> None:
    if isinstance(part, str):
        console.print(part, markup=False, soft_wrap=True)
    else:
        console.print(part)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> Table:
    """Build a table; the first ``left`` columns are text, the others numbers, aligned to the right."""
    built = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left)
    for row in rows:
        built.add_row(*(_cell(value) for value in row))
    return built


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.5g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)
