"""Which compiler makes machine code of CUDA kernels, and what to do where there is none.

TVM itself takes NVRTC, of the package cuda-bindings, wherever there is a driver, unless a variable says nvcc. A machine
with CUDA's toolkit has nvcc and often no cuda-bindings, so the one that is there is chosen.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import tvm

from .environment_variables import environment_variable
from .errors import DeviceError

COMPILERS = ("nvcc", "nvrtc")
KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"
"""The variable that makes TVM behave as without a driver, and keep CUDA code as source."""
_MODE = "TVM_CUDA_COMPILE_MODE"
_BINDINGS = "pip install 'cuda-bindings[all]'"
"""Without the extra there is no NVRTC in it."""
_FAILURES = ("Compilation error:", "NVRTC", "libnvrtc", "Cannot find CUDA")
"""What TVM's errors say when a CUDA compiler, and nothing else, failed."""


def cuda_compiler(order: tuple[str, ...] = COMPILERS) -> str | None:
    """The CUDA compiler to use: "nvcc", "nvrtc" (of the package cuda-bindings) or, if there is neither, None.

    TVM's variable ``TVM_CUDA_COMPILE_MODE`` decides; without it the first in ``order`` that is there.
    """
    wanted = os.environ.get(_MODE, "").lower()
    if wanted in COMPILERS:
        return wanted
    return next((name for name in order if is_there(name)), None)


def is_there(compiler: str) -> bool:
    """Whether one of ``COMPILERS`` is there."""
    if compiler == "nvcc":
        return shutil.which("nvcc") is not None
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@contextmanager
def compiling_here(target: tvm.target.Target) -> Iterator[None]:
    """Let TVM compile CUDA code inside the block with the compiler that is there, NVRTC first as TVM does.

    Raises DeviceError where there is none or its files are absent, and for code that it refuses. Where TVM keeps the
    source, without a driver or when told so, nothing is asked for.
    """
    if target.kind.name != "cuda" or not tvm.cuda(0).exist or os.environ.get(KEEP_SOURCE):
        yield
        return
    compiler = cuda_compiler(("nvrtc", "nvcc"))
    if compiler is None or not is_there(compiler):
        found = "there is neither nvcc on the PATH nor the package cuda-bindings (NVRTC)"
        if compiler is not None:
            lacking = "no nvcc is on the PATH" if compiler == "nvcc" else "the package cuda-bindings is not installed"
            found = f"{_MODE} is {compiler} and {lacking}"
        remedy = f"put the nvcc of CUDA's toolkit on the PATH, or install its headers and {_BINDINGS}"
        raise DeviceError(f"no compiler for CUDA kernels: {found}; {remedy}")
    try:
        with environment_variable(_MODE, compiler):
            yield
    except (RuntimeError, OSError) as error:
        if not any(words in str(error) for words in _FAILURES):
            raise
        raise compile_error(compiler, str(target.attrs["arch"]), error) from error


def compile_error(compiler: str, arch: str, error: Exception) -> DeviceError:
    """The DeviceError, of one line, for what TVM raised when ``compiler`` failed."""
    _, _, words = str(error).rpartition("Compilation error:")  # before it stands nvcc's whole source
    at = words.find("Cannot find CUDA")
    if at >= 0:
        remedy = "install CUDA's toolkit, or set CUDA_PATH to the folder that has its include folder"
        return DeviceError(f"{compiler} needs CUDA's headers: {words[at:].splitlines()[0].rstrip('.')}; {remedy}")
    if "libnvrtc" in words:
        return DeviceError(f"{compiler} is not there, but only its bindings: {_BINDINGS}")
    said = [line.strip() for line in words.splitlines() if "error" in line.lower()]
    reason = said[0] if said else f"{type(error).__name__} {words.strip()[-200:]}"
    return DeviceError(f"{compiler} cannot compile the kernels for {arch}: {reason}")
