"""From a product with the values back to the softmax that made its weights."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from .axes import AxisSpace
from .dataflow import Dataflow
from .layouts import View, broadcast_axes, source_view
from .mismatch import Mismatch
from .row_guard import is_row_guard
from .uniform import uniform


@dataclass(frozen=True)
class Weights:
    """Weights of attention: ``softmax`` is their variable, ``scores`` its input, normalized over ``keys_axis``.

    ``guarded``: a row in which every score is -inf has weights of 0 instead of NaN. ``views`` are all tensors passed.
    """

    softmax: relax.Var
    scores: View
    keys_axis: int
    guarded: bool
    views: tuple[View, ...]


def read_weights(flow: Dataflow, space: AxisSpace, view: View) -> Weights:
    """Follow the weights of a product back to a softmax; raises Mismatch at what attention has no place for."""
    guards: list[tuple[relax.Expr, bool, relax.Expr]] = []
    views: list[View] = []
    while True:
        expr, axes = view
        views.append(view)
        softmax = flow.call(expr, "nn.softmax")
        if softmax is not None:
            return _finish(flow, softmax, view, guards, tuple(views))
        source = source_view(flow, space, view)
        if source is not None:
            view = source
        elif (cast := flow.float_cast(expr)) is not None:
            view = (cast, axes)
        elif (guard := _guard(flow, expr)) is not None:
            guards.append(guard)
            view = (guard[2], broadcast_axes(guard[2], axes))
        elif (dropped := _dropout(flow, expr)) is not None:
            view = (dropped, axes)
        else:
            raise _mismatch(flow, expr)


def _finish(
    flow: Dataflow,
    softmax: relax.Call,
    view: View,
    guards: list[tuple[relax.Expr, bool, relax.Expr]],
    views: tuple[View, ...],
) -> Weights:
    axis = int(softmax.attrs.axis) % len(view[1])
    for condition, empty, kept in guards:
        if not is_row_guard(flow, condition, empty, kept, softmax.args[0], axis):
            raise Mismatch("relax.where", "weights are replaced by 0 in other rows than the fully masked ones")
    return Weights(flow.root(view[0]), (softmax.args[0], view[1]), axis, bool(guards), views)


def _guard(flow: Dataflow, expr: relax.Expr) -> tuple[relax.Expr, bool, relax.Expr] | None:
    """Return (condition, its value where weights become 0, the weights) of a ``where`` with a branch of zeros."""
    call = flow.call(expr, "where")
    if call is None:
        return None
    condition, yes, no = call.args
    if uniform(flow, yes) == 0:
        return condition, True, no
    return (condition, False, yes) if uniform(flow, no) == 0 else None


def _dropout(flow: Dataflow, expr: relax.Expr) -> relax.Expr | None:
    """Return the input of a dropout of rate 0."""
    value = flow.value(expr)
    call = flow.call(value.tuple_value, "nn.dropout") if isinstance(value, relax.TupleGetItem) else None
    if call is None or value.index != 0:
        return None
    if call.attrs.rate != 0:
        raise Mismatch("relax.nn.dropout", f"weights are dropped with probability {float(call.attrs.rate):g}")
    return call.args[0]


def _mismatch(flow: Dataflow, expr: relax.Expr) -> Mismatch:
    value = flow.value(expr)
    name = flow.operator(value.tuple_value if isinstance(value, relax.TupleGetItem) else expr)
    return Mismatch(name, _REASONS.get(name.removeprefix("relax."), "weights are changed between softmax and values"))


_REASONS = {
    "strided_slice": "a part of the weights is taken (attention sinks)",
    "split": "a part of the weights is taken (attention sinks)",
    "multiply": "weights are multiplied before they meet the values",
    "nn.relu": "weights come from a relu, not a softmax",
    "sigmoid": "weights come from a sigmoid, not a softmax",
}
