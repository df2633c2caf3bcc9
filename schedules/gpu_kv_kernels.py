"""GPUKVKernels: on CUDA, kernels laid out by hand take the place of their definitions.

A rule is a function ``(definition, target) -> kernel or None`` in a file of its own: it recognizes what the definition
does by the attributes that it carries and declines (None) what it has no kernel for; the definition then stays, correct
and slow. A kernel's parameters, in order, and results are the definition's; only counters may come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tvm
from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.site_shape import OP_ATTR

from .append_cuda import append_cuda
from .append_plain_cuda import append_plain_cuda
from .attention_decode_cuda import attention_decode_cuda
from .attention_prefill_cuda import attention_prefill_cuda
from .dequantize_cuda import dequantize_cuda
from .flush_cuda import flush_cuda
from .kernel_by_size import choices_of, kernel_by_size
from .knobs import keep_choice
from .quantize_cuda import quantize_cuda
from .rotate_cuda import rotate_cuda
from .roundtrip_cuda import roundtrip_cuda
from .vector_kv_kernels import HAND_LAID_ATTR

Rule = Callable[[tirx.PrimFunc, Target], tirx.PrimFunc | None]

RULES: dict[str, Rule] = {
    "append": append_cuda,
    "append_plain": append_plain_cuda,
    "attention_prefill": attention_prefill_cuda,
    "flush": flush_cuda,
    "dequantize": dequantize_cuda,
    "quantize": quantize_cuda,
    "rotate": rotate_cuda,
    "roundtrip": roundtrip_cuda,
    "attention_decode": attention_decode_cuda,
}
"""By the name of the operator (``OP_ATTR``)."""


@tvm.transform.module_pass(opt_level=0, name="GPUKVKernels")
class GPUKVKernels:
    """Replace definitions of KV operators by GPU kernels like them, where a rule has one."""

    def __init__(self, target: Target | None = None) -> None:
        """Set the CUDA target; None means the one that is current when the pass runs."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        target = self.target or Target.current(allow_none=False)
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            kernel = gpu_kernel(func, target) if isinstance(func, tirx.PrimFunc) else None
            if kernel is not None:
                result.update_func(gvar, kernel)
        return result


def gpu_kernel(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Return the kernel that does what a definition says it does, under the definition's name; None if none does."""
    name = func.attrs.get(OP_ATTR) if func.attrs is not None else None
    rule = RULES.get(str(name)) if name is not None else None
    if rule is None:
        return None
    choices = choices_of(func)
    if choices:
        kernel = kernel_by_size(func, choices, partial(rule, target=target))
    else:
        kernel = rule(func, target)
    if kernel is None:
        return None
    symbol = func.attrs.get("global_symbol")
    kernel = kernel.without_attr("global_symbol")
    if symbol is not None:
        kernel = kernel.with_attr("global_symbol", symbol)
    return keep_choice(func, kernel.with_attrs({HAND_LAID_ATTR: rule.__name__, "tirx.is_scheduled": True}))
