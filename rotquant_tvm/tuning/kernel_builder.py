"""Building candidates: the rule's kernel with the sampled knobs, compiled in worker processes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from ..errors import DeviceError
from .arguments import Measurement, Parameter
from .kernel_shape import KernelShape
from .worker_process import WorkerPool, last_line

LIBRARY, PORTABLE_LIBRARY = "kernel.so", "kernel.tar"
MEASUREMENT = "measurement.json"
"""What lies in a candidate's folder: the library, and what its definition is, for whoever makes its arguments."""

_USES = 64
"""Candidates that one worker compiles before it is replaced: compilers leak."""
_LOADING_SECONDS = 300.0


@derived_object
class KernelBuilder(ms.builder.PyBuilder):  # type: ignore[misc]
    """Compiles candidates into folders below ``folder``, several at a time; the workers stay from batch to batch.

    ``portable``: as a library that the machine that runs it links.
    """

    def __init__(self, folder: Path, workers: int, timeout: float, portable: bool = False) -> None:
        """Give a candidate ``timeout`` seconds."""
        super().__init__()
        self.folder, self.timeout, self.portable = folder, timeout, portable
        self._begun: dict[int, Future[str]] = {}
        self.pool = WorkerPool(workers, _USES)
        for _ in range(workers):  # they load TVM while the device is opened
            self.pool.submit(_LOADING_SECONDS, _load)

    def begin(self, mods: Sequence[tvm.IRModule], target: tvm.target.Target) -> None:
        """Start to compile candidates that will be asked for: a batch alone has fewer than there are workers."""
        for mod in mods:
            self._begun[_key(mod)] = self._submit(mod, target)

    def build(self, build_inputs: list[Any]) -> list[Any]:
        """Compile the candidates of one batch, but for what has begun."""
        known = [self._begun.pop(_key(entry.mod), None) for entry in build_inputs]
        pairs = zip(known, build_inputs, strict=True)
        jobs = [job or self._submit(entry.mod, entry.target) for job, entry in pairs]
        return [_result(job) for job in jobs]

    def _submit(self, mod: tvm.IRModule, target: tvm.target.Target) -> Future[str]:
        return self.pool.submit(self.timeout, build_candidate, mod, target, str(self.folder), self.portable)

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


def _key(mod: tvm.IRModule) -> int:
    return int(tvm_ffi.structural_hash(mod))


def _result(job: Future[str]) -> Any:
    try:
        return ms.builder.BuilderResult(job.result(), None)
    except (DeviceError, CancelledError) as error:
        return ms.builder.BuilderResult(None, f"compiling: {last_line(error)}")


def _load() -> None:
    """Import what compiling needs."""
    from .. import codegen, linker
    from ..schedules import gpu_kv_kernels, vector_kv_kernels

    assert all((codegen, linker, gpu_kv_kernels, vector_kv_kernels))


def build_candidate(mod: tvm.IRModule, target: tvm.target.Target, folder: str, portable: bool) -> str:
    """Compile a scheduled workload; returns the path of its library, in a new folder below ``folder``.

    Raises DeviceError where the rule has no kernel for the knobs.
    """
    from ..codegen import COUNTERS_ATTR, compile_module
    from ..linker import link_shared
    from ..schedules.knobs import kernel_for
    from .knob_space import chosen_definition
    from .tuning_task import MAIN

    definition = chosen_definition(mod[MAIN])
    shape = KernelShape.of(definition)
    kernel = kernel_for(definition, target)
    if kernel is None or shape is None:
        raise DeviceError("the rule has no kernel for these knobs")
    executable = compile_module(tvm.IRModule({MAIN: kernel.with_attr("global_symbol", MAIN)}), target)
    place = Path(tempfile.mkdtemp(dir=folder))
    names = [param.name for param in definition.params]
    counters = int(kernel.attrs[COUNTERS_ATTR]) if COUNTERS_ATTR in kernel.attrs else 0
    document = {"operator": shape.operator, "properties": dict(shape.properties), "names": names, "counters": counters}
    (place / MEASUREMENT).write_text(json.dumps(document))
    path = place / (PORTABLE_LIBRARY if portable else LIBRARY)
    if portable:
        from tvm.support.tar import tar

        executable.export_library(str(path), fcompile=tar)
    else:
        executable.export_library(str(path), fcompile=link_shared)
    return str(path)


@dataclass(frozen=True)
class Candidate:
    """A compiled candidate: its library, what to measure it on, and how many counters it takes before its output."""

    library: str
    measurement: Measurement
    counters: int

    @classmethod
    def read(cls, library: str, args_info: Sequence[Sequence[Any]]) -> Candidate:
        """Read what lies beside a library; dtypes and shapes are those of a record."""
        document = json.loads((Path(library).parent / MEASUREMENT).read_text())
        parameters = (
            Parameter(name, str(dtype), tuple(int(size) for size in shape))
            for name, (_, dtype, shape) in zip(document["names"], args_info, strict=True)
        )
        shape = KernelShape(document["operator"], document["properties"])
        return cls(library, Measurement(shape, tuple(parameters)), int(document["counters"]))

    def arguments(self, arrays: Sequence[Any], device: Any) -> list[Any]:
        """The arrays with the counters, which are 0 between launches, among them."""
        if not self.counters:
            return list(arrays)
        return [*arrays[:-1], device.argument(device.native(np.zeros(self.counters, np.int32))), arrays[-1]]
