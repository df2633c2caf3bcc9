"""The guard of a safe softmax: rows in which every score is masked get weights of 0 instead of NaN."""

from __future__ import annotations

from tvm import relax

from .dataflow import Dataflow, dtype_of
from .uniform import uniform

# What a tensor of truths says of scores: of each one, or of the row of all keys.
_OPPOSITE = {"hidden": "visible", "visible": "hidden", "empty": "occupied", "occupied": "empty"}


def is_row_guard(
    flow: Dataflow, condition: relax.Expr, empty: bool, kept: relax.Expr, scores: relax.Expr, keys_axis: int
) -> bool:
    """Whether ``condition`` is ``empty`` exactly in the rows of ``scores`` that are -inf for all keys.

    ``scores`` is the softmax's input, normalized over ``keys_axis``; ``kept`` are the weights that other rows keep,
    which are NaN in just those rows.
    """
    inverted = flow.call(condition, "logical_not")
    if inverted is not None:
        return is_row_guard(flow, inverted.args[0], not empty, kept, scores, keys_axis)
    nan = flow.call(condition, "isnan")
    if nan is not None:
        return empty and flow.uncast(nan.args[0]).same_as(flow.uncast(kept))
    return _meaning(flow, condition, scores, keys_axis) == ("empty" if empty else "occupied")


def _meaning(flow: Dataflow, expr: relax.Expr, scores: relax.Expr, keys_axis: int) -> str:
    call = flow.call(expr)
    if call is None:
        return ""
    name = call.op.name.removeprefix("relax.")
    if name == "astype" and dtype_of(call.args[0]).startswith(("bool", "int", "uint")):
        return _meaning(flow, call.args[0], scores, keys_axis)
    if name in ("logical_not", "bitwise_not"):
        return _OPPOSITE.get(_meaning(flow, call.args[0], scores, keys_axis), "")
    if name in ("equal", "not_equal"):
        sides = [flow.uncast(side) for side in call.args]
        values = [uniform(flow, side) for side in call.args]
        hides = any(
            side.same_as(flow.uncast(scores)) and value == float("-inf")
            for side, value in zip(sides, values[::-1], strict=True)
        )
        return ("hidden" if name == "equal" else "visible") if hides else ""
    if name in ("max", "min", "any", "all") and _over_keys(call, keys_axis):
        reduced = (name in ("max", "any"), _meaning(flow, call.args[0], scores, keys_axis))
        return {(True, "visible"): "occupied", (False, "hidden"): "empty"}.get(reduced, "")
    return ""


def _over_keys(call: relax.Call, keys_axis: int) -> bool:
    rank = call.args[0].ty.ndim
    return bool(call.attrs.keepdims) and [int(axis) % rank for axis in call.attrs.axis or []] == [keys_axis]
