"""Where a model's positions end: the rows of its tables of positions, and slices by the length of the sequence."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from rotquant_tvm.frontend.onnx_import.graph_state import GraphState
from rotquant_tvm.frontend.onnx_import.inputs import Inputs


def max_position(function: relax.Function, state: GraphState, inputs: Inputs) -> int | None:
    """The number of positions that the tables of a function have, or None if it reads none.

    A table is a weight of which rows are taken by an index that depends on no token and no activation: on
    positions, masks and sizes alone.
    """
    bindings = relax.analysis.get_var2val(function)
    plain = {param for param in (*inputs.params.values(), state.added_positions) if param is not None}
    plain = {param for param in plain if param.ty.dtype.dtype in ("int32", "int64", "bool") and param is not inputs.ids}
    limits = [rows for _, rows in state.limits]
    depends: dict[relax.Var, bool] = {}

    def of_positions(value: relax.Expr) -> bool:
        """Whether a value depends on nothing but positions, masks and sizes."""
        if not isinstance(value, relax.Var):
            return not isinstance(value, relax.Call) or all(of_positions(arg) for arg in value.args)
        if value not in bindings:
            return any(value.same_as(param) for param in plain)
        return depends[value]

    for var, value in bindings.items():
        depends[var] = all(of_positions(each) for each in _operands(value))
        if getattr(getattr(value, "op", None), "name", "") == "relax.take":
            table, index = value.args[:2]
            rows = _rows(table, value, bindings)
            if rows is not None and not isinstance(index, tvm.ir.GenericConst) and of_positions(index):
                limits.append(rows)
    return min(limits, default=None)


def _operands(value: relax.Expr) -> list[Any]:
    if isinstance(value, relax.Call):
        return [
            field
            for arg in value.args
            for field in (arg.fields if isinstance(arg, relax.Tuple) else [arg])
            if not isinstance(field, relax.ShapeExpr)
        ]
    if isinstance(value, relax.Tuple):
        return list(value.fields)
    return [value.tuple_value] if isinstance(value, relax.TupleGetItem) else [value]


def _rows(table: relax.Expr, take: relax.Call, bindings: dict[relax.Var, relax.Expr]) -> int | None:
    """Rows of a weight or constant table of vectors that is read along its first axis."""
    given = isinstance(table, tvm.ir.GenericConst) or (isinstance(table, relax.Var) and table not in bindings)
    shape = table.ty.shape.values
    axis = take.attrs.axis
    return int(shape[0]) if given and len(shape) >= 2 and axis is not None and int(axis) == 0 else None
