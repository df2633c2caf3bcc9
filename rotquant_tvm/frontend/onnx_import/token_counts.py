"""The check that lengths which a graph gives its attention are those that a session counts by itself."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from rotquant_tvm.frontend.onnx_import.graph_state import GraphState
from rotquant_tvm.frontend.onnx_import.registry import UnsupportedNode

_RESHAPING = {f"relax.{name}" for name in ("astype", "reshape", "squeeze", "expand_dims", "flatten")}


def check_token_counts(counts: relax.Expr, state: GraphState) -> None:
    """Check that ``counts`` is each sequence's number of tokens, past and new, less one.

    It is an input of its own [batch], or the row sums of an input mask [batch, length] less one. Raises UnsupportedNode
    for anything else: attention over fewer tokens than there are would silently be over all of them.
    """
    value = _plain(counts, state)
    if _is_input(value, state) and (value.ty.ndim == 1 or (value.ty.ndim == 2 and value.ty.shape[1] == 1)):
        return
    for name, step in (("subtract", 1), ("add", -1)):
        for total, one in _operands(value, name, state):
            if _number(one, state) == step and _sums_rows(_plain(total, state), state):
                return
    raise UnsupportedNode(
        "its seqlens_k is neither an input nor the row sums of an input mask less one; only such lengths are known "
        "to be those of the cache"
    )


def _plain(value: relax.Expr, state: GraphState) -> relax.Expr:
    """The value before casts and changes of shape."""
    while (call := _call(value, state)) is not None and call.op.name in _RESHAPING:
        value = call.args[0]
    return value


def _call(value: relax.Expr, state: GraphState) -> relax.Call | None:
    bound = state.builder.lookup_binding(value) if isinstance(value, relax.Var) else value
    return bound if isinstance(bound, relax.Call) and isinstance(bound.op, tvm.ir.Op) else None


def _is_input(value: relax.Expr, state: GraphState) -> bool:
    return isinstance(value, relax.Var) and any(value.same_as(param) for param in state.graph_inputs.values())


def _operands(value: relax.Expr, name: str, state: GraphState) -> list[tuple[relax.Expr, relax.Expr]]:
    call = _call(value, state)
    return [(call.args[0], call.args[1])] if call is not None and call.op.name == f"relax.{name}" else []


def _number(value: relax.Expr, state: GraphState) -> int | None:
    if isinstance(value, relax.Var):
        value = state.builder.lookup_binding(value)
    if not isinstance(value, tvm.ir.GenericConst):
        return None
    array = np.asarray(value.value.numpy())
    return int(array.ravel()[0]) if array.size == 1 else None


def _sums_rows(value: relax.Expr, state: GraphState) -> bool:
    call = _call(value, state)
    if call is None or call.op.name != "relax.sum" or call.attrs.axis is None:
        return False
    axes = [int(axis) for axis in call.attrs.axis]
    source = _plain(call.args[0], state)
    return axes in ([1], [-1]) and _is_input(source, state) and source.ty.ndim == 2 and "mask" in source.name.lower()
