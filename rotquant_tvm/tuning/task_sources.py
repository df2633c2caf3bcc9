"""Where the kernels to tune come from: a model, or the shapes of an attention whose model is not at hand."""

from __future__ import annotations

from collections.abc import Iterable

import tvm
from tvm import tirx
from tvm.target import Target

from ..kv_cache_config import KVCacheConfig
from ..ops.site_shape import OP_ATTR
from .model_functions import model_functions


def model_definitions(mod: tvm.IRModule, config: KVCacheConfig, target: Target) -> list[tirx.PrimFunc]:
    """All that can be tuned in the compile of a decoder's canonical module: the KV operators and the model's own work.

    Raises what ``compile`` raises.
    """
    from ..pass_hooks import PassHooks
    from ..pipeline import kv_passes, operator_passes, pass_context, run_passes
    from .apply_records import ApplyTuningRecords

    steps = operator_passes(target)
    before = next(index for index, step in enumerate(steps) if isinstance(step, ApplyTuningRecords))
    with pass_context(PassHooks()):
        mod = run_passes(mod, kv_passes(config, target), target)
        fused = run_passes(mod, steps[:before], target)
    return [*_operators(mod), *model_functions(fused)]


def pass_definitions(mod: tvm.IRModule, config: KVCacheConfig, target: Target) -> list[tirx.PrimFunc]:
    """The KV operators in the compile of a decoder's canonical module. Raises what ``compile`` raises."""
    from ..pass_hooks import PassHooks
    from ..pipeline import kv_passes, pass_context, run_passes

    with pass_context(PassHooks()):
        mod = run_passes(mod, kv_passes(config, target), target)
    return _operators(mod)


def _operators(mod: tvm.IRModule) -> list[tirx.PrimFunc]:
    """The KV operators of a module, by name."""
    functions = [mod[gvar] for gvar in sorted(mod.get_global_vars(), key=lambda gvar: str(gvar.name_hint))]
    return [func for func in functions if isinstance(func, tirx.PrimFunc) and func.attrs and OP_ATTR in func.attrs]


def vector_definitions(formats: Iterable[str], head_dim: int, dtype: str, target: Target) -> list[tirx.PrimFunc]:
    """The operators of codecs on plain vectors. Raises ``FormatError``."""
    from .. import ops
    from ..formats import KVFormat

    axes = ops.Axes.of(target)
    codecs = [KVFormat.parse(name).codec(head_dim) for name in formats]
    operators = (ops.roundtrip, ops.quantize, ops.dequantize)
    return [operator(codec, dtype, axes) for codec in codecs for operator in operators]


def operators_of(target: Target) -> set[str]:
    """The operators, of the cache and of a model, that there are rules for on a kind of target."""
    from ..schedules import gpu_kv_kernels, vector_kv_kernels
    from ..schedules.model_kernels import MODEL_RULES

    kind = target.kind.name
    rules = gpu_kv_kernels.RULES if kind == "cuda" else vector_kv_kernels.RULES
    return {*rules, *(operator for operator, each in MODEL_RULES if each == kind)}
