"""FusePrefillRotation: prefill attention takes queries, keys and values as they are and rotates for the past alone.

Attention among the tokens of a chunk is the same in every basis, so that only what reads the packed past needs the
rotated one: a first chunk then rotates nothing, where it took four launches over all its vectors. The kernel
rotates by matrices, whatever the layers of the rotation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tvm
from rotquant_tvm.schedules.attention_prefill_cuda import build
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.rotation_matrices import rotation_arguments
from rotquant_tvm.ops.site_shape import SiteShape

from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, site_shape

Turned = tuple[relax.Expr, Rotation]


@tvm.transform.module_pass(opt_level=0, name="FusePrefillRotation")
class FusePrefillRotation:
    """Fuse rotate ×3 → attention_prefill → rotate into one call; runs after ``LowerKVOps``, in the pipeline for GPUs.

    Left alone is what the target's kernel does not take, and a chunk that is not rotated just before (one that was
    quantized and dequantized).
    """

    def __init__(self, target: tvm.target.Target) -> None:
        """Set the target, whose kernels decide what they take."""
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
        if kernel is None or kernel[0] not in ("attention_prefill", "rotate"):
            return call
        if kernel[0] == "rotate":
            after = self._rotated(call)
            attention = self.lookup_binding(after[0]) if after is not None else None
        else:
            after, attention = None, call
        fused = self._fused(attention, after[1] if after is not None else None)
        return call if fused is None else fused

    def _fused(self, attention: relax.Expr | None, after: Rotation | None) -> relax.Expr | None:
        """The call in the place of an attention whose output is rotated by ``after`` (None: by nothing)."""
        kernel = kernel_of(self.mod, attention)
        if attention is None or kernel is None or kernel[0] != "attention_prefill":
            return None
        shape = site_shape(kernel[1])
        rotated = [not codec.rotation.identity for codec in shape.codecs()]
        if shape.rotated or not any(rotated) or rotated[1] != (after is not None):
            return None
        operands = list(attention.args[1].fields)
        found = [self._source(x, rotated[role]) for x, role in zip(operands, (0, 0, 1), strict=False)]
        sources = [source for source in found if source is not None]
        if len(sources) < 3 or not _agree([rotation for _, rotation in sources], after):
            return None
        shape = replace(shape, rotated=True)
        if not self._taken(shape):
            return None
        matrices = _matrices([rotation for _, rotation in sources[1:]], shape)
        arguments = [*(x for x, _ in sources), *operands[3:], *matrices]
        return relax.call_tir(self.kernels.attention_packed(shape, 1), arguments, attention.ty_args[0])

    def _source(self, operand: relax.Expr, rotated: bool) -> tuple[relax.Expr, Rotation | None] | None:
        """(what an operand is the rotation of, which rotation); the operand itself where there is to be none."""
        if not rotated:
            return operand, None
        value = self.lookup_binding(operand)
        return self._rotated(value) if value is not None else None

    def _rotated(self, value: relax.Expr) -> Turned | None:
        kernel = kernel_of(self.mod, value)
        shape = RotationShape.of(kernel[1]) if kernel is not None and kernel[0] == "rotate" else None
        if shape is None:
            return None
        source, coefficients = value.args[1].fields
        if not isinstance(coefficients, tvm.ir.GenericConst):
            return None
        return source, Rotation.from_data(shape.head_dim, shape.structure, coefficients.value.numpy())

    def _taken(self, shape: SiteShape) -> bool:
        if shape not in self._known:
            self._known[shape] = self.target.kind.name != "cuda" or build(shape, self.target) is not None
        return self._known[shape]


def _agree(rotations: list[Rotation | None], after: Rotation | None) -> bool:
    """Whether queries and keys have one rotation, and the output the values' inverse one."""
    query, key, value, output = (None if x is None else x.matrix() for x in (*rotations, after))
    same = query is None or np.allclose(query, key, atol=1e-5)
    return same and (value is None or np.allclose(output, value.T, atol=1e-5))


def _matrices(rotations: list[Rotation | None], shape: SiteShape) -> list[relax.Expr]:
    given = [rotation or Rotation(shape.head_dim) for rotation in rotations]
    return [relax.const(matrix) for matrix in rotation_arguments(shape.codecs(), given, shape.dtype)]
