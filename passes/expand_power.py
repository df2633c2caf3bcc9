"""ExpandPower: x to a small whole power becomes products.

RMS norms are exported as ``power(x, 2)``; GPU compilers turn a general power under fast math into exp2(2·log2 x), which
is NaN for every negative x, and a call of ``pow`` is slow everywhere.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from .function_rewriter import FunctionRewriter

LARGEST = 4


@tvm.transform.module_pass(opt_level=0, name="ExpandPower")
class ExpandPower:
    """Replace ``power(x, n)`` by products for a scalar constant n of 2, 3 or 4, in every Relax function."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        return _Expand(mod).transform()


@mutator
class _Expand(FunctionRewriter):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.power":
            return call
        base, exponent = call.args
        value = exponent.value.numpy() if isinstance(exponent, tvm.ir.GenericConst) else None
        if value is None or value.size != 1 or float(value.ravel()[0]) not in range(2, LARGEST + 1):
            return call
        product = base
        for step in range(int(value.ravel()[0]) - 1):
            product = relax.op.multiply(self.builder_.emit(product) if step else product, base)
        return product
