"""VectorKVKernels: on CPUs, attention kernels laid out by hand take the place of their definitions."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .attention_decode_llvm import attention_decode_llvm
from .attention_prefill_llvm import attention_prefill_llvm

KERNELS: dict[str, Callable[[SiteShape, Target], tirx.PrimFunc]] = {
    "attention_decode": attention_decode_llvm,
    "attention_prefill": attention_prefill_llvm,
}


@tvm.transform.module_pass(opt_level=0, name="VectorKVKernels")
class VectorKVKernels:
    """Replace each attention definition that carries its ``SiteShape`` by the vector kernel of the same interface."""

    def __init__(self, target: Target | None = None) -> None:
        """Set the llvm target; None means the one that is current when the pass runs."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        target = self.target or Target.current(allow_none=False)
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            shape = SiteShape.of(func) if isinstance(func, tirx.PrimFunc) else None
            build = KERNELS.get(str(func.attrs[OP_ATTR])) if shape is not None else None
            if build is not None:
                result.update_func(gvar, build(shape, target).without_attr("global_symbol"))
        return result
