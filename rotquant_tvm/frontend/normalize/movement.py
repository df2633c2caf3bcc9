"""Operators that move data and compute nothing, and what is followed through them."""

from __future__ import annotations

from typing import Any

from tvm import relax

from rotquant_tvm.frontend.normalize.step_view import StepView, op_name

MOVES = {
    "permute_dims", "reshape", "expand_dims", "squeeze", "flatten", "astype", "strided_slice", "take", "split",
    "broadcast_to", "flip", "dynamic_strided_slice",
}  # fmt: skip
"""One operand's elements in another order, shape or type, or some of them."""

PACKS = {"concat", "stack"}
WRITES = {"scatter_elements", "scatter_nd", "index_put"}
"""New elements put into a copy of the first operand, at places that the second gives."""


def moved_from(view: StepView, var: relax.Expr) -> relax.Var | None:
    """The variable whose elements another one moves; None if it does not."""
    value: Any = view.value(var) if isinstance(var, relax.Var) else None
    if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Var):
        return value.tuple_value
    if isinstance(value, relax.Var):
        return value
    if op_name(value) in MOVES and isinstance(value.args[0], relax.Var):
        return value.args[0]
    return None


def origin(view: StepView, var: relax.Expr) -> relax.Expr:
    """The first of the variables whose elements ``var`` moves, back through all moves."""
    while (before := moved_from(view, var)) is not None:
        var = before
    return var


def moves(view: StepView, var: relax.Var, source: relax.Var) -> bool:
    """Whether ``var`` moves the elements of ``source`` by one operator."""
    before = moved_from(view, var)
    return before is not None and before.same_as(source)
