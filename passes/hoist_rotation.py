"""HoistRotation: the inverse rotation leaves the cache side of attention.

Because ⟨q, Rᵀk⟩ = ⟨Rq, k⟩ and Σ pᵢ Rᵀvᵢ = Rᵀ Σ pᵢ vᵢ, attention over un-rotated keys and values equals attention over
the stored ones with the query rotated once and the output un-rotated once.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.formats import Rotation

from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, rotation_constant, site_shape


@tvm.transform.module_pass(opt_level=0, name="HoistRotation")
class HoistRotation:
    """Rotate queries and un-rotate outputs instead of un-rotating every cached key and value."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return _Hoist(mod).transform()


@mutator
class _Hoist(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.kernels = KernelLibrary(self.builder_)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        kernel = kernel_of(self.mod, call)
        if kernel is None or kernel[0] != "attention_dense":
            return call
        shape = site_shape(kernel[1])
        codec_k, codec_v = shape.codecs()
        operands = list(call.args[1])
        key = self._unrotated(operands[1], codec_k.inverse_rotation.structure, shape.head_dim)
        value = self._unrotated(operands[2], codec_v.inverse_rotation.structure, shape.head_dim)
        if key is not None:
            operands[0] = self._rotate(operands[0], key[1])
            operands[1] = key[0]
            if shape.chunk:
                operands[3] = self._rotated(operands[3], key[1])
        if value is not None:
            operands[2] = value[0]
            if shape.chunk:
                operands[4] = self._rotated(operands[4], value[1])
        output = relax.call_tir(call.args[0], operands, call.ty_args[0])
        if value is None:
            return output
        return self._rotate(self.builder_.emit(output), value[1].inverse(), emit=False)

    def _unrotated(
        self, operand: relax.Expr, structure: tuple[tuple[int, int], ...], head_dim: int
    ) -> tuple[relax.Expr, Rotation] | None:
        """(stored tensor, its rotation R) if ``operand`` is Rᵀ of it."""
        value = self.lookup_binding(operand)
        kernel = kernel_of(self.mod, value) if value is not None else None
        if kernel is None or kernel[0] != "rotate":
            return None
        stored, coefficients = value.args[1].fields
        return stored, Rotation.from_data(head_dim, structure, coefficients.value.numpy()).inverse()

    def _rotated(self, x: relax.Expr, rotation: Rotation) -> relax.Expr:
        """R x; where x is Rᵀ y, this is y."""
        inner = self._unrotated(x, rotation.inverse().structure, rotation.head_dim)
        if inner is not None and np.array_equal(inner[1].data, rotation.data):
            return inner[0]
        return self._rotate(x, rotation)

    def _rotate(self, x: relax.Expr, rotation: Rotation, emit: bool = True) -> relax.Expr:
        kernel = self.kernels.rotate(rotation.structure, rotation.head_dim, str(x.ty.dtype))
        call = relax.call_tir(kernel, [x, rotation_constant(rotation)], x.ty)
        return self.builder_.emit(call) if emit else call
