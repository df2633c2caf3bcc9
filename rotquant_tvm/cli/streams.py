"""The terminal's two streams, kept for the command alone.

TVM, torch and LLVM print warnings of their own to both streams. While a command runs, what they print goes to
a file that is thrown away (or, at -vv, to standard error); the command writes to copies of the streams.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Streams:
    """Where results (``out``) and progress, notes and errors (``err``) go."""

    out: TextIO
    err: TextIO


@contextmanager
def own_streams(show_others: bool) -> Iterator[Streams]:
    """Give the command streams that nobody else writes to; ``show_others`` sends the rest to standard error.

    Where Python's streams are not the process's own (inside a test, a notebook), they are used as they are.
    """
    if not (_stands_on(sys.stdout, 1) and _stands_on(sys.stderr, 2)):
        yield Streams(sys.stdout, sys.stderr)
        return
    saved = os.dup(1), os.dup(2)
    out, err = (_text_stream(number) for number in saved)
    with tempfile.TemporaryFile() as unseen:
        target = saved[1] if show_others else unseen.fileno()
        _point_standard_streams_to(target, target)
        try:
            yield Streams(out, err)
        finally:
            _point_standard_streams_to(*saved)
            for stream in (out, err):
                _close(stream)


def _stands_on(stream: TextIO | None, number: int) -> bool:
    try:
        return stream is not None and stream.fileno() == number
    except (OSError, ValueError):
        return False


def _text_stream(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="replace", buffering=1, newline=None)


def _point_standard_streams_to(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


def _close(stream: TextIO) -> None:
    try:
        stream.close()
    except BrokenPipeError:  # the reader has gone; what is left to write has no place to go
        pass
