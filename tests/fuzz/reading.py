"""One reading of a file of any content: a result or a documented error, within bounds of time and memory.

The bounds are enforced while it reads, since some faults would take the machine with them: processor time by a
signal, memory by the limit of the process's addresses. An input that ends the process is the file left behind.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rotquant_tvm.errors import RotQuantError

from .fuzzing import SECONDS

Result = TypeVar("Result")
ADDRESSES = 2 << 30
"""Bytes that one reading may ask for beyond what the process has; ``fuzz`` measures what it touches."""

_NO_MEMORY = ("allocate memory", "bad_alloc", "MemoryError", "Unable to allocate", "Cannot allocate")


class _TooSlow(BaseException):
    """Raised by a signal; readers that turn any ``Exception`` into their own do not see it."""


def read(reader: Callable[[], Result]) -> Result | None:
    """What ``reader`` returns, or None where it refuses the file with a message of few lines."""
    try:
        with _bounded():
            return reader()
    except RotQuantError as error:
        message = str(error)
        assert message.strip() and len(message) < 20_000, "an error without a message, or with an endless one"
        causes = f"{message} {error.__cause__!r} {error.__context__!r}"
        if any(sign in causes for sign in _NO_MEMORY):
            raise AssertionError("it asked for more memory than there is") from error
        return None
    except _TooSlow:
        raise AssertionError(f"it took {SECONDS} s of processor time") from None


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)  # again: where nothing can be raised, Python drops it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
