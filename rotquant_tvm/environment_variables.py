"""Environment variables that TVM reads while it compiles, set for as long as that takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()
"""They are the process's: a thread that needs one waits for those that need another value."""


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable inside the block, and put it back behind it; other threads wait at theirs meanwhile."""
    with _LOCK:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
