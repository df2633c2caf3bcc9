"""Code generation: TVM's compiler with one addition, kernels that are laid out by hand down to the instruction.

Scheduled TensorIR goes through TVM's pipeline for it, which places barriers and plans shared memory. A TIRx kernel
(``s_tir=False``) has done that itself and must not be touched, so it goes through the pipeline of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.tirx import compilation_pipeline
from tvm_ffi import structural_walk

from .cuda_compiler import compiling_here
from .device_code import kept_source

if TYPE_CHECKING:
    from .tuning.shape_buckets import WantedSizes

COUNTERS_ATTR = "rotquant.counters"
"""Function attribute of a kernel that takes int32 counters, 0 between launches, before its output: how many."""

_LAUNCH_TAGS, _EARLY_START = "tirx.kernel_launch_params", "tirx.use_programtic_dependent_launch"
"""TVM's attribute of a device function, and the launch parameter without a value that it has for early starts."""

PIPELINE = "rotquant"
"""The name under which the mixed pipeline is registered with TVM."""


def compile_module(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """``tvm.compile`` for a module of scheduled TensorIR, TIRx kernels and Relax functions.

    On CUDA the Relax functions hold calls of kernels and views alone, of which TVM's own pipeline would make kernels.
    Raises DeviceError if CUDA code is to be compiled for the GPU at hand and cannot be.
    """
    relax_pipeline = _lower_calls() if target.kind.name == "cuda" else "default"
    with kept_source(target), compiling_here(target):
        return tvm.compile(mod, target, relax_pipeline=relax_pipeline, tir_pipeline=PIPELINE)


def _lower_calls() -> tvm.transform.Pass:
    """From calls and views to instructions of the virtual machine."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


def compile_kernel(
    func: tirx.PrimFunc,
    target: tvm.target.Target,
    *,
    aligned: bool = False,
    wanted: WantedSizes | None = None,
    tuned: bool = True,
) -> Callable[..., None]:
    """Compile one operator's definition, or the kernel laid out by hand that there is for it, on its own.

    ``aligned``: every array will start at a multiple of 64 bytes, as TVM's own do; the CPU's vector kernels need it.
    GPU kernels need 16 bytes. The kernel's knobs are those of its tuning record made nearest to the ``wanted`` sizes,
    unless the definition has chosen them or it is not to be ``tuned``.
    """
    if tuned:
        from .tuning.apply_records import with_record
        from .tuning.record_lookup import TuningRecords

        func = with_record(func, TuningRecords(target), wanted)
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    if target.kind.name == "cuda":
        from .schedules.gpu_kv_kernels import GPUKVKernels

        mod = GPUKVKernels(target)(mod)
    elif aligned:
        from .schedules.vector_kv_kernels import VectorKVKernels

        kernel = VectorKVKernels(target)(mod)["kernel"]
        mod = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return bind_counters(compile_module(mod, target)["kernel"], mod["kernel"])


def bind_counters(kernel: Callable[..., None], func: tirx.PrimFunc) -> Callable[..., None]:
    """A compiled kernel with its definition's arguments: counters that it takes besides are bound to it.

    They are its own, one array per device: launches on several streams must not overlap.
    """
    attrs = func.attrs or {}
    if COUNTERS_ATTR not in attrs:
        return kernel
    arrays: dict[int, tvm.runtime.Tensor] = {}

    def run(*arguments: Any) -> None:
        index = int(arguments[-1].device.index or 0)
        if index not in arrays:
            arrays[index] = tvm.runtime.tensor(np.zeros(int(attrs[COUNTERS_ATTR]), np.int32), tvm.cuda(index))
        kernel(*arguments[:-1], arrays[index], arguments[-1])

    return run


def is_tirx(func: Any) -> bool:
    """Whether a function is a TIRx kernel rather than schedulable TensorIR."""
    return isinstance(func, tirx.PrimFunc) and func.attrs is not None and not bool(func.attrs.get("s_tir", False))


def _mixed_pipeline() -> tuple[tvm.transform.Pass, Any, Any]:
    scheduled, finalize_host, finalize_device = compilation_pipeline.get_tir_pipeline("s_tir")
    laid_out, _, _ = compilation_pipeline.get_tir_pipeline("tirx")

    @tvm.transform.module_pass(opt_level=0, name="MixedPipeline")  # type: ignore[untyped-decorator]
    def lower(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        own = {gvar: func for gvar, func in mod.functions_items() if is_tirx(func)}
        if not own:
            return scheduled(mod)
        rest = {gvar: func for gvar, func in mod.functions_items() if gvar not in own}
        result = _with_early_starts(laid_out(tvm.IRModule(own, attrs=mod.attrs)))
        result.update(scheduled(tvm.IRModule(rest, attrs=mod.attrs)))
        return result

    return lower, finalize_host, finalize_device


def _with_early_starts(mod: tvm.IRModule) -> tvm.IRModule:
    """Launch kernels that wait for their inputs themselves before the kernel before them has ended."""
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    for gvar, func in mod.functions_items():
        tags = (func.attrs or {}).get(_LAUNCH_TAGS)
        if tags is not None and _waits(func):
            result.update_func(gvar, func.with_attr(_LAUNCH_TAGS, [_EARLY_START, *map(str, tags)]))
    return result


def _waits(func: tirx.PrimFunc) -> bool:
    """Whether a kernel waits for the kernels before it."""
    found: list[bool] = []

    def visit(call: tvm.ir.Call) -> None:
        if getattr(call.op, "name", "") == "tirx.ptx.griddepcontrol":
            found.append(str(call.args[0].value) == "wait")

    structural_walk(func.body, (tvm.ir.Call, visit))
    return any(found)


compilation_pipeline.register_tir_pipeline(PIPELINE, _mixed_pipeline)
