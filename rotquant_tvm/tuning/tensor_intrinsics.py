"""TVM's tensor intrinsics, loaded in seconds.

Every ``TuneContext`` imports them. They are some hundred functions in TVMScript, and for each the parser asks
``inspect.stack()`` where it stands. For a frame without a source file, as those of the import system are, ``inspect``
goes through all loaded modules: with torch and transformers among them the import took a minute of computing, without
that search 3 s.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

_MODULE = "tvm.s_tir.tensor_intrin"
_LOCK = threading.Lock()


def load_tensor_intrinsics() -> None:
    """Import TVM's tensor intrinsics; nothing happens the second time."""
    with _LOCK:
        if _MODULE not in sys.modules:
            with frames_without_modules():
                importlib.import_module(_MODULE)


@contextmanager
def frames_without_modules() -> Iterator[None]:
    """Have ``inspect`` not look for the module of a frame; TVM's parser reads only the frames' lines and variables."""
    original = inspect.getmodule

    def getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType):
            return None
        return original(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = original
