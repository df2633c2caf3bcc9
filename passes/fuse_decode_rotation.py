"""FuseDecodeRotation: decode attention rotates its queries and un-rotates its output itself.

On a GPU a rotation of a few rows takes a launch as long as a short attention does; in the attention's own blocks it
hides behind the first copies from memory. Only what its kernel takes is fused: rotations of small blocks.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
from rotquant_tvm.schedules.attention_decode_cuda import build
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.site_shape import SiteShape

from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, site_shape


@tvm.transform.module_pass(opt_level=0, name="FuseDecodeRotation")
class FuseDecodeRotation:
    """Fuse rotate → attention_decode → rotate into one call; runs after ``LowerKVOps``, in the pipeline for GPUs."""

    def __init__(self, target: tvm.target.Target) -> None:
        """Set the target, whose kernels decide which rotations they take."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return _Fuse(mod, self.target).transform()


@mutator
class _Fuse(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule, target: tvm.target.Target) -> None:
        super().__init__(mod)
        self.target = target
        self.kernels = KernelLibrary(self.builder_, target)
        self._known: dict[SiteShape, bool] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        kernel = kernel_of(self.mod, call)
        if kernel is None or kernel[0] != "rotate":
            return call
        attention = self.lookup_binding(call.args[1].fields[0])
        inner = kernel_of(self.mod, attention) if attention is not None else None
        if inner is None or inner[0] != "attention_decode":
            return call
        operands = list(attention.args[1].fields)
        query = self.lookup_binding(operands[0])
        before = kernel_of(self.mod, query) if query is not None else None
        if before is None or before[0] != "rotate":
            return call
        shape = replace(site_shape(inner[1]), rotated=True)
        structures = tuple(RotationShape.of(func).structure for func in (before[1], kernel[1]))
        if structures != _structures(shape) or not self._taken(shape):
            return call
        fused = self.kernels.attention_packed(shape, shape.splits)
        raw, rotation_k = query.args[1].fields
        return relax.call_tir(fused, [raw, *operands[1:], rotation_k, call.args[1].fields[1]], call.ty_args[0])

    def _taken(self, shape: SiteShape) -> bool:
        """Whether the target's kernel takes the rotations; layers of one shape are asked about once."""
        if shape not in self._known:
            self._known[shape] = self.target.kind.name != "cuda" or build(shape, self.target) is not None
        return self._known[shape]


def _structures(shape: SiteShape) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The structures of the rotations of a shape's queries and output."""
    key, value = shape.codecs()
    pairs = (key.rotation.structure, value.inverse_rotation.structure)
    return tuple(tuple(tuple(layer) for layer in structure) for structure in pairs)
