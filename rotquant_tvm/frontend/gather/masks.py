"""Masks of spelled-out attention as one additive operand [batch, 1, queries, keys]."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from .axes import Axes, Axis, AxisSpace
from .dataflow import Dataflow, dtype_of
from .emit import Emitter
from .layouts import View, broadcast_axes, source_view
from .scores import Mask

_ELEMENTWISE = {
    *("add", "subtract", "multiply", "divide", "floor_divide", "maximum", "minimum", "where", "astype", "negative"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "clip", "abs", "isinf", "isnan"),
    *("logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not"),
}


def mask_source(flow: Dataflow, space: AxisSpace, mask: Mask) -> Mask:
    """Return the mask with its tensor as it was before changes of layout."""
    view = mask.view
    while (source := source_view(flow, space, view)) is not None:
        view = source
    return Mask(view, mask.factor, mask.hidden, mask.fill)


def varies(flow: Dataflow, space: AxisSpace, view: View, along: Axis) -> bool:
    """Whether a tensor may differ along some of these atoms; False is certain."""
    expr, axes = view
    if not set(space.atoms(axes)) & set(space.resolve(along)):
        return False
    source = source_view(flow, space, view)
    if source is not None:
        return varies(flow, space, source, along)
    value, call = flow.value(expr), flow.call(expr)
    if isinstance(value, tvm.ir.GenericConst):
        return _constant_varies(space, value.value.numpy(), axes, along)
    if call is None:
        return True
    name = call.op.name.removeprefix("relax.")
    if name in ("full", "full_like", "zeros", "zeros_like", "ones", "ones_like"):
        return False
    if name == "strided_slice" and flow.fields(call.args[1]):
        return _slice_varies(flow, space, call, axes, along)
    if name not in _ELEMENTWISE:
        return True
    operands = [operand for operand in call.args if hasattr(operand.ty, "ndim")]
    return any(varies(flow, space, (operand, broadcast_axes(operand, axes)), along) for operand in operands)


def _constant_varies(space: AxisSpace, values: np.ndarray, axes: Axes, along: Axis) -> bool:
    for place, axis in enumerate(axes):
        if set(space.resolve(axis)) & set(space.resolve(along)):
            first = np.take(values, [0], place)
            if not np.array_equal(values, np.broadcast_to(first, values.shape)):
                return True
    return False


def _slice_varies(flow: Dataflow, space: AxisSpace, call: relax.Call, axes: Axes, along: Axis) -> bool:
    """A slice differs along the axes that it leaves whole as what it is taken from does."""
    cut = {int(axis) % len(axes) for axis in flow.fields(call.args[1])}
    if any(set(space.resolve(axes[place])) & set(space.resolve(along)) for place in cut):
        return True
    whole = tuple(() if place in cut else axis for place, axis in enumerate(axes))
    return varies(flow, space, (call.args[0], whole), along)


def lowest(dtype: str) -> float:
    """Return the least finite number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def emit_mask(emitter: Emitter, space: AxisSpace, mask: Mask, layout: Axes, dtype: str) -> relax.Expr:
    """Emit one mask as an additive operand of ``dtype`` in ``layout``, extents of 1 where it is the same.

    A score that is hidden by a number becomes the least finite one, so that rows in which all are hidden keep
    equal weights.
    """
    present = space.atoms(mask.view[1])
    shape = [space.size(tuple(atom for atom in space.resolve(axis) if atom in present)) for axis in layout]
    expr = emitter.cast(emitter.layout(space, *mask.view, layout), shape)
    if mask.hidden is not None:
        fill = relax.const(-math.inf if math.isinf(mask.fill) else lowest(dtype), dtype)
        zero = relax.const(0.0, dtype)
        return emitter.emit(R.where(expr, fill, zero) if mask.hidden else R.where(expr, zero, fill))
    if mask.factor != 1:
        expr = emitter.emit(R.multiply(expr, relax.const(mask.factor, dtype_of(expr))))
    if dtype_of(expr) != dtype:
        expr = emitter.emit(R.astype(expr, dtype))
    return expr


def never_empty(flow: Dataflow, space: AxisSpace, masks: tuple[Mask, ...], keys: Axis) -> bool:
    """Whether these masks certainly leave a score above -inf in every row, over the atoms ``keys``."""
    if not masks:
        return True
    return len(masks) == 1 and _leaves_one(flow, masks[0], space.resolve(masks[0].view[1][-1]) == keys)


def _leaves_one(flow: Dataflow, mask: Mask, keys_last: bool) -> bool:
    value = flow.value(mask.view[0])
    if mask.hidden is not None:
        if math.isfinite(mask.fill):
            return True
        visible = value.value.numpy() != mask.hidden if isinstance(value, tvm.ir.GenericConst) else None
    elif isinstance(value, tvm.ir.GenericConst):
        visible = value.value.numpy() > -math.inf
    else:
        return _finite(flow, mask.view[0])
    return visible is not None and keys_last and bool(visible.any(axis=-1).all())


def _finite(flow: Dataflow, expr: relax.Expr) -> bool:
    """Whether an additive mask is finite by its making: chosen from finite constants, or 0 and 1 times one."""
    value, call = flow.value(expr), flow.call(expr)
    if isinstance(value, tvm.ir.GenericConst):
        return bool(np.isfinite(value.value.numpy().astype(np.float64)).all())
    if call is None:
        return False
    name = call.op.name.removeprefix("relax.")
    if name == "where":
        return all(_finite(flow, branch) for branch in call.args[1:])
    if name == "astype":
        source = dtype_of(call.args[0])
        return source.startswith(("bool", "int", "uint")) or (source == dtype_of(call) and _finite(flow, call.args[0]))
    if name in ("multiply", "subtract"):
        return all(_finite(flow, operand) for operand in call.args)
    moved = ("reshape", "permute_dims", "expand_dims", "squeeze", "broadcast_to", "strided_slice")
    return name in moved and _finite(flow, call.args[0])
