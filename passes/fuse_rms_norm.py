"""FuseRMSNorm: the operators that a float16 model's RMS norm is exported as become one kernel on CUDA.

The form is that of transformers: x is widened, multiplied by rsqrt(mean(x²) + ε), rounded to float16 and multiplied by
the weight. ``ExpandPower`` has made a product of the square.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator
from tvm.target import Target

from ..schedules.rms_norm_cuda import rms_norm, takes_features
from .function_rewriter import FunctionRewriter


@tvm.transform.module_pass(opt_level=0, name="FuseRMSNorm")
class FuseRMSNorm:
    """Replace RMS norms over the last axis of float16 tensors, in every Relax function; other norms stay."""

    def __init__(self, target: Target) -> None:
        """Set the CUDA target."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        return _Fuse(mod, self.target).transform()


@mutator
class _Fuse(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule, target: Target) -> None:
        super().__init__(mod)
        self.target = target

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not _is(call, "multiply"):
            return call
        for weight, rounded in (call.args, call.args[::-1]):
            x, epsilon = self._normalized(rounded) or (None, 0.0)
            if x is not None and self._fits(x, weight):
                kernel = rms_norm(int(x.ty.shape[-1]), epsilon, len(x.ty.shape) - 1, self.target)
                return relax.call_tir(self.builder_.add_func(kernel, "rms_norm"), [x, weight], x.ty)
        return call

    def _normalized(self, rounded: relax.Expr) -> tuple[relax.Var, float] | None:
        """(x, ε) of a variable that is x / rms(x), rounded."""
        cast = self._bound(rounded, "astype")
        product = self._bound(cast.args[0], "multiply") if cast is not None else None
        if product is None or str(cast.ty.dtype) != "float16":
            return None
        for wide, inverse in (product.args, product.args[::-1]):
            root = self._bound(inverse, "rsqrt")
            mean, epsilon = self._mean(root.args[0]) if root is not None else (None, 0.0)
            source = self._bound(wide, "astype")
            square = self._bound(mean.args[0], "multiply") if mean is not None else None
            if source is None or square is None or not all(arg.same_as(wide) for arg in square.args):
                continue
            if [str(each.ty.dtype) for each in (wide, source.args[0])] == ["float32", "float16"]:
                return source.args[0], epsilon
        return None

    def _mean(self, value: relax.Expr) -> tuple[relax.Call | None, float]:
        """(mean over the last axis, ε) of a variable that is their sum."""
        total = self._bound(value, "add")
        for term, constant in (total.args, total.args[::-1]) if total is not None else ():
            mean = self._bound(term, "mean")
            if mean is None or not isinstance(constant, tvm.ir.GenericConst) or constant.value.numpy().size != 1:
                continue
            axes = [int(axis) for axis in mean.attrs.axis] if mean.attrs.axis is not None else []
            if mean.attrs.keepdims and axes in ([-1], [mean.args[0].ty.ndim - 1]):
                return mean, float(constant.value.numpy().ravel()[0])
        return None, 0.0

    def _fits(self, x: relax.Expr, weight: relax.Expr) -> bool:
        if not isinstance(x.ty.shape, relax.ShapeExpr) or weight.ty.ndim != 1 or str(weight.ty.dtype) != "float16":
            return False
        features = x.ty.shape[-1]
        return isinstance(features, tvm.tirx.IntImm) and takes_features(int(features))

    def _bound(self, var: relax.Expr, name: str) -> relax.Call | None:
        """The call of an operator that a variable is bound to."""
        value = self.lookup_binding(var) if isinstance(var, relax.Var) else None
        return value if value is not None and _is(value, name) else None


def _is(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == f"relax.{name}"
