"""Where the kernels to tune come from: a model, or the shapes of an attention whose model is not at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import tvm
from tvm import tirx
from tvm.target import Target

from ..errors import UsageError
from ..kv_cache_config import KVCacheConfig
from ..ops.site_shape import OP_ATTR
from .model_functions import model_functions
from .tuning_task import TuningTask


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


def selected_tasks(tasks: Sequence[TuningTask], selection: str) -> list[TuningTask]:
    """The tasks that ``all``, ``0,2-4`` or parts of their names name. Raises ``UsageError``."""
    if selection == "all":
        return list(tasks)
    chosen: dict[int, None] = {}
    for word in filter(None, (part.strip() for part in selection.split(","))):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if span is not None:
            first, last = int(span[1]), int(span[2] or span[1])
            if first > last or last >= len(tasks):
                raise UsageError(f"--tasks {word}: there are tasks 0 to {len(tasks) - 1}; see --tasks list")
            chosen |= dict.fromkeys(range(first, last + 1))
        else:
            named = [index for index, task in enumerate(tasks) if word.lower() in task.name.lower()]
            if not named:
                raise UsageError(f"--tasks {word}: no task has that in its name; see --tasks list")
            chosen |= dict.fromkeys(named)
    if not chosen:
        raise UsageError("--tasks is empty; give list, all, numbers like 0,2-4, or parts of names")
    return [tasks[index] for index in sorted(chosen)]
