"""LowerKVOps: dequantize followed by dense attention becomes attention that reads the packed codes."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.errors import UsageError

from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, site_shape

# Work items that keep two to four cores evenly busy, and half of a large GPU.
SPLITS = {"llvm": 8, "cuda": 64}


@tvm.transform.module_pass(opt_level=0, name="LowerKVOps")
class LowerKVOps:
    """Fuse dequantization into attention; afterwards no unpacked key or value exists in memory.

    Run after ``HoistRotation``; raises ``UsageError`` where a cache is still un-rotated on its own.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return _Lower(mod).transform()


@mutator
class _Lower(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.kernels = KernelLibrary(self.builder_)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        kernel = kernel_of(self.mod, call)
        if kernel is None or kernel[0] != "attention_dense":
            return call
        shape = site_shape(kernel[1])
        operands = list(call.args[1])
        stored = self._stored(operands[1])
        if stored is None or not stored[0].same_as(self._stored(operands[2])[0]):
            raise UsageError(
                "an attention's keys and values do not come straight from its packed cache; run HoistRotation first"
            )
        splits = max(1, SPLITS[self.kernels.axes.kind] // shape.kv_heads)
        packed = self.kernels.attention_packed(shape, splits)
        query, lengths, new_lengths = operands[0], operands[-2], operands[-1]
        if shape.chunk:
            arguments = [query, operands[3], operands[4], *stored, lengths, new_lengths]
        else:
            arguments = [query, *stored, lengths]
        return relax.call_tir(packed, arguments, call.ty_args[0])

    def _stored(self, operand: relax.Expr) -> list[relax.Expr] | None:
        """The arrays that ``operand`` is the dequantized keys or values of."""
        item = self.lookup_binding(operand)
        value = self.lookup_binding(item.tuple_value) if isinstance(item, relax.TupleGetItem) else None
        kernel = kernel_of(self.mod, value) if value is not None else None
        if kernel is None or kernel[0] not in ("dequantize_cache", "dequantize_segments"):
            return None
        return list(value.args[1])[:-1]  # all but the lengths
