"""Loading a shared library so that it is the file's own and goes when nobody uses it any more."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tvm_ffi
from tvm.runtime import Module


def load_module(path: Path) -> Module:
    """Load the library file ``path``; raises what TVM raises.

    It is loaded under a name that was never used before: asked for a path that it has loaded once, the system's loader
    returns the library of then, even if the file is another one by now. ``tvm.runtime.load_module`` keeps every library
    until the process ends, and 85 KB or more of what it read at each load; here the library's users keep it.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / path.name
        try:
            name.symlink_to(path.resolve())
        except OSError:  # not everywhere are there links
            name = path
        return tvm_ffi.load_module(str(name), keep_module_alive=False)
