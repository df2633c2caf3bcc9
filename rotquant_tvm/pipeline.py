"""The compile pipeline: which passes run, in which order, for which target."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import relax

from .errors import UsageError
from .kv_cache_config import KVCacheConfig
from .pass_hooks import PassHooks
from .target import resolve_target

if TYPE_CHECKING:
    from .tuning.record_lookup import TuningRecords
    from .tuning.shape_buckets import WantedSizes

__all__ = [
    "check_pass_names",
    "kv_passes",
    "operator_passes",
    "pass_context",
    "pass_names",
    "resolve_target",
    "run_passes",
]

# RewriteDataflowReshape cannot prove shapes with a symbolic batch and length divisible; reshapes stay calls.
DISABLED_PASSES = ("RewriteDataflowReshape",)
REQUIRED_PASSES = ("QuantizeKVCache", "LegalizeOps")


def kv_passes(config: KVCacheConfig, target: tvm.target.Target, every_logit: bool = False) -> list[tvm.transform.Pass]:
    """Return the project's passes on the model's graph, in order; ``every_logit`` as of ``QuantizeKVCache``."""
    from .passes.expand_power import ExpandPower
    from .passes.find_attention import FindAttention
    from .passes.fold_rotation import FoldRotation
    from .passes.hoist_rotation import HoistRotation
    from .passes.lower_kv_ops import LowerKVOps
    from .passes.pack_linear_weights import PackLinearWeights
    from .passes.quantize_kv_cache import QuantizeKVCache
    from .passes.widen_arithmetic import WidenArithmetic

    passes = [ExpandPower(), FindAttention(), QuantizeKVCache(config, every_logit=every_logit)]
    passes += [HoistRotation(), LowerKVOps()]
    if target.kind.name == "llvm":
        passes.insert(0, WidenArithmetic())
        passes.insert(-1, FoldRotation())  # before LowerKVOps; on GPUs append and attention rotate by themselves
        passes.append(PackLinearWeights(target))
    else:
        from .passes.fuse_decode_rotation import FuseDecodeRotation
        from .passes.fuse_prefill_rotation import FusePrefillRotation
        from .passes.fuse_rms_norm import FuseRMSNorm
        from .passes.fuse_rotary import FuseRotary
        from .passes.fuse_row_rotation import FuseRowRotation
        from .passes.join_linear_weights import JoinLinearWeights
        from .passes.view_reshapes import ViewReshapes

        passes += [FuseDecodeRotation(target), FusePrefillRotation(target), FuseRowRotation(target)]
        passes += [JoinLinearWeights(target), FuseRMSNorm(target), FuseRotary(target), ViewReshapes()]
    return passes


def operator_passes(
    target: tvm.target.Target, records: TuningRecords | None = None, wanted: WantedSizes | None = None
) -> list[tvm.transform.Pass]:
    """From Relax operators to scheduled TensorIR.

    ``records``: the tuning records for the target (None: the user's and the packaged ones); ``wanted``: the sizes that
    they should be near to.
    """
    from .passes.view_reshapes import VIEW
    from .tuning.apply_records import ApplyTuningRecords

    transform = relax.transform
    passes = [
        transform.LegalizeOps(skip_ops=None if target.kind.name == "llvm" else [VIEW]),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        ApplyTuningRecords(target, records, wanted),
    ]
    if target.kind.name == "llvm":
        from .schedules.schedule_for_llvm import ScheduleForLLVM
        from .schedules.vector_kv_kernels import VectorKVKernels

        passes += [VectorKVKernels(target), ScheduleForLLVM(target)]
    else:
        from .passes.hoist_scratch import HoistScratch
        from .schedules.gpu_kv_kernels import GPUKVKernels
        from .schedules.schedule_for_cuda import schedule_for_cuda

        passes += [GPUKVKernels(target), schedule_for_cuda(), HoistScratch()]
    return passes


def run_passes(mod: tvm.IRModule, passes: Sequence[tvm.transform.Pass], target: tvm.target.Target) -> tvm.IRModule:
    """Apply passes one by one under ``target``; hooks act through the pass context."""
    with target:
        for step in passes:
            mod = step(mod)
    return mod


def pass_context(
    hooks: PassHooks, opt_level: int = 3, config: Mapping[str, Any] | None = None
) -> tvm.transform.PassContext:
    """Return the context that a whole compile runs in.

    ``config``: TVM's pass configuration, e.g. ``{"tirx.disable_vectorize": True}``. Raises ``UsageError`` for
    a key or value that TVM does not know, an ``opt_level`` outside 0 to 3 and a disabled pass that must not
    be.
    """
    if opt_level not in range(4):
        raise UsageError(f"the optimization level is {opt_level!r}; it must be 0, 1, 2 or 3")
    for name in hooks.disabled:
        if name in REQUIRED_PASSES:
            raise UsageError(f"pass {name} cannot be disabled: nothing works without it")
    if "HoistRotation" in hooks.disabled and "LowerKVOps" not in hooks.disabled:
        raise UsageError("LowerKVOps needs HoistRotation; disable both or neither")
    known = sorted(str(key) for key in tvm.transform.PassContext.list_configs())
    for key in config or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
            raise UsageError(f"unknown pass configuration '{key}'; did you mean {' or '.join(near)}?")
    try:
        return tvm.transform.PassContext(
            opt_level=opt_level,
            config=dict(config or {}),
            disabled_pass=list(DISABLED_PASSES),
            instruments=hooks.instruments(),
        )
    except Exception as error:
        raise UsageError(f"bad pass configuration: {str(error).splitlines()[-1]}") from error


def pass_names(target: tvm.target.Target) -> list[str]:
    """Names of the pipeline's own passes, in order; TVM runs more inside them and after them."""
    steps = [*kv_passes(KVCacheConfig.parse("f16"), target), *operator_passes(target)]
    return [str(step.info.name) for step in steps]


def check_pass_names(names: Iterable[str], target: tvm.target.Target) -> None:
    """Raise ``UsageError`` for a name that is neither the pipeline's nor one of TVM's passes."""
    own = pass_names(target)
    for name in names:
        if name not in own and name not in (inner := _tvm_pass_names()):
            near = difflib.get_close_matches(name, [*own, *inner], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"unknown pass '{name}'; {hint}The pipeline's passes: {', '.join(own)}; TVM's inside them go "
                "by names like tirx.VectorizeLoop"
            )


def _tvm_pass_names() -> set[str]:
    """TVM keeps no list of its passes, but each is made by a registered function of its name."""
    names = set()
    for name in tvm_ffi.registry.list_global_func_names():
        dialect, _, rest = name.partition(".transform.")
        if dialect in ("relax", "tirx", "s_tir") and rest:
            names.add(rest if dialect == "relax" else f"{dialect}.{rest}")
    return names
