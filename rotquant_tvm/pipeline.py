"""The compile pipeline: which passes run, in which order, for which target."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax

from .errors import UsageError
from .kv_cache_config import KVCacheConfig

# RewriteDataflowReshape cannot prove shapes with a symbolic batch and length divisible; reshapes stay calls then.
DISABLED_PASSES = ("RewriteDataflowReshape",)


@dataclass(frozen=True)
class PassHooks:
    """What the pipeline does around its passes: called with a pass's name and the module."""

    before: Callable[[str, tvm.IRModule], None] | None = None
    after: Callable[[str, tvm.IRModule], None] | None = None
    disabled: Sequence[str] = field(default_factory=tuple)


def resolve_target(target: str | tvm.target.Target) -> tvm.target.Target:
    """A full target from what users write: ``"llvm"`` means this CPU, ``"cuda"`` the GPU at hand.

    Raises ``UsageError`` for another kind, or one that TVM does not know.
    """
    if not isinstance(target, tvm.target.Target):
        try:
            if target == "llvm":
                target = host_target()
            elif target == "cuda":
                target = tvm.target.Target.from_device("cuda")
            else:
                target = tvm.target.Target(target)
        except Exception as error:
            raise UsageError(f"unknown target '{target}': {str(error).splitlines()[-1]}") from error
    if target.kind.name not in ("llvm", "cuda"):
        raise UsageError(f"target kind '{target.kind.name}' is not supported; use llvm or cuda")
    if target.kind.name == "cuda" and target.host is None:
        target = target.with_host(host_target())
    return target


def host_target() -> tvm.target.Target:
    """This machine's CPU, with all of its vector extensions and cores."""
    cpu = tvm.get_global_func("target.llvm_get_system_cpu", allow_missing=True)
    name = str(cpu()) if cpu is not None else "generic"
    return tvm.target.Target({"kind": "llvm", "mcpu": name, "num-cores": os.cpu_count() or 1})


def kv_passes(config: KVCacheConfig, target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """The project's passes on the model's graph, in order."""
    from .passes.find_attention import FindAttention
    from .passes.hoist_rotation import HoistRotation
    from .passes.lower_kv_ops import LowerKVOps
    from .passes.pack_linear_weights import PackLinearWeights
    from .passes.quantize_kv_cache import QuantizeKVCache

    passes = [FindAttention(), QuantizeKVCache(config), HoistRotation(), LowerKVOps()]
    if target.kind.name == "llvm":
        passes.append(PackLinearWeights(target))
    return passes


def operator_passes(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """From Relax operators to scheduled TensorIR."""
    transform = relax.transform
    passes = [
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
    ]
    if target.kind.name == "llvm":
        from .schedules.schedule_for_llvm import ScheduleForLLVM

        passes.append(ScheduleForLLVM(target))
    else:
        from tvm.s_tir import dlight as dl

        rules = (dl.gpu.Matmul(), dl.gpu.GEMV(), dl.gpu.Reduction(), dl.gpu.GeneralReduction(), dl.gpu.Fallback())
        passes.append(dl.ApplyDefaultSchedule(*rules))
    return passes


def run_passes(
    mod: tvm.IRModule, passes: Sequence[tvm.transform.Pass], target: tvm.target.Target, hooks: PassHooks
) -> tvm.IRModule:
    """Apply passes one by one, with the hooks around each; a disabled pass is left out."""
    with target:
        for step in passes:
            name = step.info.name
            if name in hooks.disabled:
                continue
            if hooks.before is not None:
                hooks.before(name, mod)
            mod = step(mod)
            if hooks.after is not None:
                hooks.after(name, mod)
    return mod
