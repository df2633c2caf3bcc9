"""Loading a shared library so that it is the file's own and goes when nobody uses it any more."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import tvm_ffi
from tvm.runtime import Module


def load_module(path: Path) -> Module:
    """Load the library file ``path``; raises what TVM raises.

    A copy is loaded. Of a file that is loaded already the system's loader would return the library that is there, whose
    kernels TVM looks up in the module that was loaded last, even if that one has gone. And of a path that it has
    loaded, the library of then, even if the file is another one by now.
    ``tvm.runtime.load_module`` keeps every library until the process ends, and 85 KB or more of what it read at each
    load; here the library's users keep it.

    Where there is no room for a copy, or nothing may be run from the folder for temporary files, the file itself is
    loaded, under a name of its own: then it must not be loaded twice.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        name = Path(folder) / path.name
        if not _copied(path, name):
            try:
                name.symlink_to(path.resolve())
            except OSError:  # not everywhere are there links
                name = path
        return tvm_ffi.load_module(str(name), keep_module_alive=False)


def _copied(path: Path, copy: Path) -> bool:
    """Copy a library to where it may be run; False where that cannot be."""
    try:
        if os.name == "posix" and os.statvfs(copy.parent).f_flag & getattr(os, "ST_NOEXEC", 0):
            return False
        shutil.copyfile(path, copy)
    except OSError:
        copy.unlink(missing_ok=True)
        return False
    return True
