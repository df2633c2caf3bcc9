"""Building candidates: the rule's kernel with the sampled knobs, compiled in worker processes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

from ..errors import DeviceError
from .arguments import Measurement, Parameter
from .kernel_shape import KernelShape

LIBRARY, PORTABLE_LIBRARY = "kernel.so", "kernel.tar"
MEASUREMENT = "measurement.json"
"""What lies in a candidate's folder: the library, and what its definition is, for whoever makes its arguments."""

_USES = 64
"""Candidates that one worker compiles before it is replaced: compilers leak."""


@derived_object
class KernelBuilder(ms.builder.PyBuilder):  # type: ignore[misc]
    """Compiles candidates into folders below ``folder``, several at a time; the workers stay from batch to batch.

    ``portable``: as a library that the machine that runs it links.
    """

    def __init__(self, folder: Path, workers: int, timeout: float, portable: bool = False) -> None:
        """Give a candidate ``timeout`` seconds."""
        super().__init__()
        self.folder, self.timeout, self.portable = folder, timeout, portable
        self.pool = PopenPoolExecutor(max_workers=workers, timeout=timeout, maximum_process_uses=_USES)
        for _ in range(workers):  # they load TVM while the device is opened
            self.pool.submit(_load)

    def build(self, build_inputs: list[Any]) -> list[Any]:
        """Compile the candidates of one batch."""
        jobs = [(entry.mod, entry.target, str(self.folder), self.portable) for entry in build_inputs]
        results = []
        for outcome in self.pool.map_with_error_catching(lambda job: build_candidate(*job), jobs):
            if outcome.status == StatusKind.COMPLETE:
                results.append(ms.builder.BuilderResult(outcome.value, None))
            elif outcome.status == StatusKind.TIMEOUT:
                results.append(ms.builder.BuilderResult(None, f"compiling took more than {self.timeout:g} s"))
            else:
                results.append(ms.builder.BuilderResult(None, last_line(outcome.value)))
        return results

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown()


def _load() -> None:
    """Import what compiling needs."""
    from .. import codegen, linker
    from ..schedules import gpu_kv_kernels, vector_kv_kernels

    assert all((codegen, linker, gpu_kv_kernels, vector_kv_kernels))


def build_candidate(mod: tvm.IRModule, target: tvm.target.Target, folder: str, portable: bool) -> str:
    """Compile a scheduled workload; returns the path of its library, in a new folder below ``folder``.

    Raises DeviceError where the rule has no kernel for the knobs.
    """
    from ..codegen import compile_module
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
    document = {"operator": shape.operator, "properties": dict(shape.properties), "names": names}
    (place / MEASUREMENT).write_text(json.dumps(document))
    path = place / (PORTABLE_LIBRARY if portable else LIBRARY)
    if portable:
        from tvm.support.tar import tar

        executable.export_library(str(path), fcompile=tar)
    else:
        executable.export_library(str(path), fcompile=link_shared)
    return str(path)


def last_line(error: object) -> str:
    """The last line of what an error says, without its type's name."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(error).__name__


def read_measurement(library: str, args_info: Sequence[Sequence[Any]]) -> Measurement:
    """What to measure a candidate on: what lies beside its library, with the dtypes and shapes of a record."""
    document = json.loads((Path(library).parent / MEASUREMENT).read_text())
    parameters = (
        Parameter(name, str(dtype), tuple(int(size) for size in shape))
        for name, (_, dtype, shape) in zip(document["names"], args_info, strict=True)
    )
    return Measurement(KernelShape(document["operator"], document["properties"]), tuple(parameters))
