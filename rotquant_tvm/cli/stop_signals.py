"""Ctrl-C and termination: what they raise, and once more at a command's next step if that was lost.

Python drops an exception that a signal raises inside a finalizer, and a library may swallow one that it raises inside a
callback. The command would go on to its end as if nobody had asked for it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 143
"""Exit status of a command that a termination signal ended."""

_received: list[int] = []


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let an interrupt and a termination unwind the block, so that it clears away what it had begun to write.

    They raise KeyboardInterrupt and ``SystemExit(TERMINATED)``. Outside the main thread signals go elsewhere.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        raise_if_stopped()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def raise_if_stopped() -> None:
    """Raise what the last signal raised, if there was one."""
    if _received:
        raise SystemExit(TERMINATED) if _received[-1] == signal.SIGTERM else KeyboardInterrupt
