"""A Relax function as a graph: what is bound to each variable, who reads it, and what a value is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tvm
from tvm import relax, tirx

SHAPE_READERS = {"shape_of", "zeros_like", "ones_like", "full_like", "size"}
"""Operators that read the shape of their first operand and not its values."""


class StepView:
    """The bindings of ``function`` in order.

    Attributes: ``values`` (variable to what is bound to it), ``bindings`` (to the binding itself), ``index`` (to its
    place in the order), ``uses`` (to the variables that its binding reads, each once), ``readers`` (variable or
    parameter to the variables whose bindings read it), ``outputs`` (the function's results).
    """

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.values: dict[relax.Var, Any] = {}
        self.bindings: dict[relax.Var, relax.Binding] = {}
        self.uses: dict[relax.Var, list[relax.Var]] = {}
        self.readers: dict[relax.Var, list[relax.Var]] = {param: [] for param in function.params}
        for block in function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var], self.bindings[binding.var] = binding.value, binding
                self.readers[binding.var] = []
                self.uses[binding.var] = list(dict.fromkeys(operands(binding.value)))
                for operand in self.uses[binding.var]:
                    self.readers[operand].append(binding.var)
        self.index = {var: place for place, var in enumerate(self.values)}
        result = function.body.body
        while isinstance(result, relax.Var) and isinstance(self.values.get(result), (relax.Var, relax.Tuple)):
            result = self.values[result]
        self.outputs: list[relax.Expr] = list(result.fields) if isinstance(result, relax.Tuple) else [result]

    def value(self, var: relax.Expr) -> Any:
        """What is bound to a variable, or None."""
        return self.values.get(var)

    def op(self, var: relax.Expr) -> str:
        """Name of the operator bound to a variable, without "relax."; empty if it is no call of an operator."""
        return op_name(self.values.get(var)) if isinstance(var, relax.Var) else ""

    def slice(
        self, roots: Iterable[relax.Expr], stop: Callable[[relax.Var], bool] = lambda _: False
    ) -> list[relax.Var]:
        """All variables, parameters included, that the roots' *values* are computed from, in order.

        The roots are part of it. Variables for which ``stop`` holds are part of it, what they are made of is not.
        What is read for its shape alone is left out.
        """
        found: set[relax.Var] = set()
        waiting = [var for root in roots for var in ([root] if isinstance(root, relax.Var) else operands(root))]
        while waiting:
            var = waiting.pop()
            if var in found:
                continue
            found.add(var)
            if not stop(var) and var in self.values:
                waiting += value_operands(self.values[var]) if self.op(var) in SHAPE_READERS else self.uses[var]
        return sorted(found, key=lambda var: self.index.get(var, -1))

    def reached(
        self, roots: Iterable[relax.Var], stop: Callable[[relax.Var], bool] = lambda _: False
    ) -> set[relax.Var]:
        """All variables whose values are computed from a root's; the roots are part of it.

        What lies behind a variable for which ``stop`` holds is not followed.
        """
        found: set[relax.Var] = set()
        waiting = list(roots)
        while waiting:
            var = waiting.pop()
            if var in found:
                continue
            found.add(var)
            if not stop(var):
                waiting += [user for user in self.readers[var] if var in value_operands(self.values[user])]
        return found


def op_name(value: relax.Expr | None) -> str:
    """Name of the operator that an expression calls, without "relax."; empty if it calls none."""
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return str(value.op.name).removeprefix("relax.")
    return ""


def is_size(expr: relax.Expr) -> bool:
    """Whether an expression is a number of the program (a size), not a tensor."""
    return isinstance(getattr(expr, "ty", None), tvm.ir.PrimType)


def operands(value: relax.Expr) -> list[relax.Var]:
    """The variables that an expression reads, in order; sizes are none."""
    return list(_operands(value))


def value_operands(value: relax.Expr) -> list[relax.Var]:
    """The variables whose values, not only shapes, an expression reads."""
    if op_name(value) in SHAPE_READERS:
        return [var for arg in value.args[1:] for var in operands(arg)]
    return operands(value)


def _operands(value: relax.Expr) -> Iterator[relax.Var]:
    if is_size(value):
        return
    if isinstance(value, relax.Var):
        yield value
    elif isinstance(value, relax.Call):
        for arg in value.args:
            yield from _operands(arg)
    elif isinstance(value, relax.Tuple):
        for field in value.fields:
            yield from _operands(field)
    elif isinstance(value, relax.TupleGetItem):
        yield from _operands(value.tuple_value)


def dims(expr: relax.Expr) -> Any:
    """The dimensions of a tensor as a list, numbers as ints; None if they are unknown or it is no tensor."""
    shape = getattr(getattr(expr, "ty", None), "shape", None)
    if not isinstance(shape, relax.ShapeExpr):
        return None
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in shape.values]


def dtype_of(expr: relax.Expr) -> str:
    """The element type of a tensor, "float32"; empty if it is no tensor."""
    return str(expr.ty.dtype) if isinstance(expr.ty, relax.TensorType) and expr.ty.dtype is not None else ""
