"""One attention compiled for one device: found in this process, in the user's compile cache, or compiled now."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tvm

from ..codegen import compile_module
from ..compile_cache import CompileCache, cache_folder
from ..errors import DeviceError, UsageError
from ..linker import export_library
from ..pass_hooks import PassHooks
from ..pipeline import kv_passes, operator_passes, pass_context, run_passes
from ..runtime import CompiledLibrary, load_library, write_artifact
from ..runtime.cache_arrays import CacheArrays
from ..runtime.device import device_errors, parse_device
from ..runtime.forks import check_fork
from ..session_limits import session_limits
from ..target import resolve_target
from .attention_geometry import AttentionGeometry
from .attention_module import READ, attention_module, take_rotations, with_read

FOLDER = "attention"
"""Where the compile cache keeps these, apart from whole models."""
KEEP = 64
_LEFT_OUT = ("FoldRotation", "PackLinearWeights", "JoinLinearWeights", "FuseRMSNorm", "FusePrefillRotation")
"""Passes that would take queries, keys and values for weights, or have nothing to do without any; the last one would
make one layer's rotation a constant of the library that serves all layers."""


class AttentionLibrary:
    """The functions of one geometry on one device; every thread has a virtual machine of its own."""

    def __init__(self, geometry: AttentionGeometry, library: CompiledLibrary) -> None:
        self.geometry, self.library = geometry, library
        self._local = threading.local()

    def create(self, batch: int, capacity: int) -> CacheArrays:
        """Allocate the arrays of one layer; raises DeviceError if they do not fit."""
        return self.library.create_cache(batch, capacity)

    def run(self, function: str, *arguments: Any) -> Any:
        """Call ``prefill(q, k, v, new_lengths, *arrays, *rotations)``, ``decode`` (without new lengths) or ``read``.

        Takes tensors of torch or TVM, and returns TVM's or torch's. Raises DeviceError if the device fails.
        """
        check_fork()
        functions = self._local.__dict__.setdefault("functions", {})
        if function not in functions:
            machine = self._local.__dict__.setdefault("machine", self.library.virtual_machine())
            functions[function] = machine[function]
        with device_errors(f"{function} failed on {self.library.device}", "reset the cache before it is used again"):
            return functions[function](*arguments)


@functools.lru_cache(maxsize=256)
def attention_library(geometry: AttentionGeometry, device: str) -> AttentionLibrary:
    """Return the library of a geometry for a device (``cpu``, ``cuda:0``).

    It is compiled once per user. Where the compile cache cannot be written, or nothing is there to link with, it is
    compiled once per process. Raises ``ModelError`` or ``FormatError`` for what a format cannot take and
    ``DeviceError`` for an absent device.
    """
    place = parse_device(device)
    target = resolve_target("llvm" if device == "cpu" else "cuda")
    make = functools.cache(partial(_compile, geometry.check(), target))  # at most once, wherever it ends up
    try:
        cache = CompileCache(cache_folder() / FOLDER, KEEP)
        found = cache.entry((geometry.key(), str(target)), lambda: _saver(*make(), target))
        return AttentionLibrary(geometry, load_library(found.path, device))
    except (UsageError, DeviceError):
        executable, _ = make()
        return AttentionLibrary(geometry, CompiledLibrary(executable.jit(), [], place))


def _saver(executable: Any, info: dict[str, Any], target: tvm.target.Target) -> Callable[[Path], object]:
    write = partial(export_library, executable)
    return lambda path: write_artifact(path, write, {}, kv_cache_info=info, target=str(target))


def _functions(geometry: AttentionGeometry, target: tvm.target.Target) -> tvm.IRModule:
    """The library's functions, which hold nothing of any one layer."""
    passes = [step for step in kv_passes(geometry.config(), target) if str(step.info.name) not in _LEFT_OUT]
    mod = run_passes(attention_module(geometry), passes, target)
    if geometry.readable:
        with target:
            mod = with_read(mod, geometry)
    return take_rotations(mod, geometry)


def _compile(geometry: AttentionGeometry, target: tvm.target.Target) -> tuple[Any, dict[str, Any]]:
    """Compile a geometry; returns TVM's executable and what its ``kv_cache_info`` says."""
    from ..passes.quantize_kv_cache import read_cache_info, with_cache_info

    with pass_context(PassHooks()):
        mod = run_passes(_functions(geometry, target), operator_passes(target), target)
        info = read_cache_info(mod) | {"weights": []} | session_limits(mod, target)
        return compile_module(with_cache_info(mod, info), target), info


__all__ = ["READ", "AttentionLibrary", "attention_library"]
