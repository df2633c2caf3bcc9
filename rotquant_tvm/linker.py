"""Turns TVM's object files into a shared library, with whatever compiler there is.

That is a system's C or C++ compiler or, where there is none, the one in the PyPI package ``ziglang``. Needs
nothing but the standard library, so that the command line can check before it loads TVM.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import DeviceError

_COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_SHARED = ("-shared", "-fPIC", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))

_ROOM = 16 << 20  # bytes that must be free: where it cannot write an object file, LLVM ends the process


def linker_command() -> list[str]:
    """Return the words of the compiler's command: $CXX or $CC, one on the PATH, or that of ziglang.

    Variables that name no program are passed over. Raises DeviceError if there is no compiler.
    """
    for candidate in (os.environ.get("CXX"), os.environ.get("CC"), *_COMPILERS):
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]  # its c++ would first build a C++ library, for nothing
    raise DeviceError(
        "no C++ compiler was found to link the compiled library with; install g++ or clang, or pip install ziglang"
    )


def link_shared(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
    """Link object files into the shared library ``output``; the ``fcompile`` of TVM's ``export_library``.

    Raises DeviceError, with the compiler's own words, if there is no compiler or it fails.
    """
    command = [*linker_command(), *_SHARED, "-o", str(output), *(options or ()), *map(str, objects)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise DeviceError(f"{command[0]} cannot link the compiled library (status {done.returncode}): {said}")


def export_library(executable: object, path: str, pack_imports: Callable[..., str] | None = None) -> None:
    """Write what ``tvm.compile`` returned as the shared library ``path``; raises DeviceError, OSError on a full disk.

    ``pack_imports``: what writes the modules that are not linked (``device_code``); by default TVM does.

    The object files lie beside it meanwhile, so that whoever removes a killed process's folder removes them too.
    """
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".link.") as folder:
        if shutil.disk_usage(folder).free < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        executable.export_library(path, fcompile=link_shared, workspace_dir=folder, fpack_imports=pack_imports)  # type: ignore[attr-defined]
