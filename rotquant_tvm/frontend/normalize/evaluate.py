"""Evaluation of parts of a step in NumPy at concrete sizes.

Masks, positions and cache layouts are told by what they compute. Compiling such a part with TVM takes a second or
two for each set of sizes' operators; in NumPy a whole model's masks at a dozen sizes take a fraction of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
import tvm
from tvm import relax, tirx

from rotquant_tvm.frontend.normalize.array_operators import ARRAY_OPERATORS
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.scalar_operators import SCALAR_OPERATORS
from rotquant_tvm.frontend.normalize.size_arithmetic import UnknownSize, number
from rotquant_tvm.frontend.normalize.step_view import StepView, dtype_of, is_size, op_name, operands

OPERATORS = SCALAR_OPERATORS | ARRAY_OPERATORS


class Evaluation:
    """Values of a step's variables for given inputs; each is computed once.

    ``inputs``: values of parameters (and of any variable where the evaluation is to begin). ``sizes``: numbers for
    the symbolic sizes. ``keep_values``: casts change nothing, for arrays of tags that no type could hold.
    """

    def __init__(
        self,
        view: StepView,
        inputs: Mapping[relax.Var, np.ndarray],
        sizes: Mapping[tirx.Var, int],
        keep_values: bool = False,
    ) -> None:
        self.view, self.sizes, self.keep_values = view, dict(sizes), keep_values
        self.known: dict[relax.Var, Any] = dict(inputs)

    def value(self, expr: relax.Expr) -> Any:
        """The value of an expression: an array, a list for a tuple, a tuple of ints for a shape.

        Raises Unevaluable naming the operator or parameter that stands in the way.
        """
        waiting = [var for var in operands(expr) if var not in self.known]
        while waiting:
            var = waiting[-1]
            if var in self.known:
                waiting.pop()
                continue
            if var not in self.view.values:
                self.known[var] = self._shape_alone(var)
                continue
            missing = [used for used in self.view.uses[var] if used not in self.known]
            if missing:
                waiting += missing
            else:
                self.known[var] = self._bound(var)
        return self._expr(expr)

    def shape(self, expr: relax.Expr) -> tuple[int, ...]:
        """The shape that the type of an expression says."""
        try:
            return tuple(number(size, self.sizes) for size in expr.ty.shape.values)
        except (UnknownSize, AttributeError) as error:
            raise Unevaluable(f"the shape of {getattr(expr, 'name', 'a value')} is not known") from error

    def _shape_alone(self, var: relax.Var) -> np.ndarray:
        """A parameter without a value: its shape may be read. Reading it as a value is what callers rule out."""
        return np.broadcast_to(np.zeros((), np.float32), self.shape(var))

    def _bound(self, var: relax.Var) -> Any:
        binding = self.view.bindings[var]
        result = self._expr(binding.value)
        if isinstance(binding, relax.MatchCast) and isinstance(binding.ty, relax.TensorType):
            for size, actual in zip(binding.ty.shape.values, np.shape(result), strict=True):
                if isinstance(size, tirx.Var):
                    self.sizes.setdefault(size, actual)
        return result

    def _expr(self, expr: relax.Expr) -> Any:
        if is_size(expr):
            return self._number(expr)
        if isinstance(expr, relax.Var):
            return self.known[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return [self._expr(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._expr(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return tuple(self._number(size) for size in expr.values)
        if isinstance(expr, relax.Call):
            return self._call(expr)
        raise Unevaluable(type(expr).__name__)

    def _number(self, size: tvm.ir.Expr) -> Any:
        if isinstance(size, tirx.FloatImm):
            return float(size)
        try:
            return number(size, self.sizes)
        except UnknownSize as error:
            raise Unevaluable(f"the size {error}") from error

    def _call(self, call: relax.Call) -> Any:
        name = op_name(call)
        if name not in OPERATORS:
            raise Unevaluable(f"relax.{name}" if name else "a call of a function")
        args = [self._expr(arg) for arg in call.args]
        if self.keep_values and name == "astype":
            return args[0]
        try:
            with np.errstate(all="ignore"):
                result = OPERATORS[name](call.attrs, *args)
        except (ValueError, IndexError, TypeError) as error:
            raise Unevaluable(f"relax.{name} at these sizes ({error})") from error
        dtype = dtype_of(call)
        if isinstance(result, np.ndarray | np.generic) and dtype and not self.keep_values:
            with np.errstate(all="ignore"):
                result = np.asarray(result).astype(dtype, copy=False)
        return result
