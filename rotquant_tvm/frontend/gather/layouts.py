"""Changes of layout, followed from their result back to what they were made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from .axes import Axes, AxisSpace, shape_of
from .dataflow import Dataflow

View = tuple[relax.Expr, Axes]
"""A tensor and its axes."""

_Step = Callable[[AxisSpace, relax.Call, Axes], Axes | None]


def source_view(flow: Dataflow, space: AxisSpace, view: View) -> View | None:
    """Return what a tensor is a change of layout of, with its axes; None if it is computed otherwise.

    Permutations, reshapes, added and dropped axes of extent 1, and repetitions in any spelling: an atom that is
    absent from the source is one along which the source is repeated.
    """
    call = flow.call(view[0])
    if call is None:
        return None
    name = call.op.name.removeprefix("relax.")
    if name == "concat":
        return _from_copies(flow, space, call, view[1])
    if name == "take":
        axes = _taken(flow, space, call, view[1])
    elif name in _STEPS:
        axes = _STEPS[name](space, call, view[1])
    else:
        return None
    return None if axes is None else (call.args[0], axes)


def broadcast_axes(expr: relax.Expr, axes: Axes) -> Axes:
    """Return the axes of an operand of an elementwise operator whose result has ``axes``.

    A size that TVM cannot say is taken for the result's: in a valid function it is that or 1, and where it is 1 a
    tensor of known sizes farther back shows it.
    """
    rank = expr.ty.ndim
    shape = shape_of(expr)
    own = axes[len(axes) - rank :] if rank else ()
    if shape is None:
        return own
    return tuple(
        () if isinstance(size, tvm.tirx.IntImm) and int(size) == 1 else axis
        for size, axis in zip(shape, own, strict=True)
    )


def _permute(_: AxisSpace, call: relax.Call, axes: Axes) -> Axes:
    order = call.attrs.axes
    order = list(range(len(axes)))[::-1] if order is None else [int(axis) % len(axes) for axis in order]
    return tuple(axes[order.index(axis)] for axis in range(len(axes)))


def _reshape(space: AxisSpace, call: relax.Call, axes: Axes) -> Axes | None:
    shape = shape_of(call.args[0])
    return None if shape is None else space.align(space.atoms(axes), shape)


def _expand_dims(_: AxisSpace, call: relax.Call, axes: Axes) -> Axes:
    added = {int(axis) % len(axes) for axis in call.attrs.axis}
    return tuple(axis for place, axis in enumerate(axes) if place not in added)


def _squeeze(_: AxisSpace, call: relax.Call, axes: Axes) -> Axes | None:
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    if call.attrs.axis is None:
        dropped = {place for place, size in enumerate(shape) if isinstance(size, tvm.tirx.IntImm) and int(size) == 1}
    else:
        dropped = {int(axis) % len(shape) for axis in call.attrs.axis}
    kept = iter(axes)
    return tuple(() if place in dropped else next(kept) for place in range(len(shape)))


def _broadcast(_: AxisSpace, call: relax.Call, axes: Axes) -> Axes:
    return broadcast_axes(call.args[0], axes)


def _repeat(space: AxisSpace, call: relax.Call, axes: Axes) -> Axes | None:
    if call.attrs.axis is None:
        return None
    return _undo(space, call, axes, int(call.attrs.axis) % len(axes), int(call.attrs.repeats), copies_last=True)


def _tile(space: AxisSpace, call: relax.Call, axes: Axes) -> Axes | None:
    repeats = [int(count) for count in call.attrs.repeats]
    repeats = [1] * (len(axes) - len(repeats)) + repeats
    result: Axes | None = axes
    rank = call.args[0].ty.ndim
    for place in range(len(axes) - rank, len(axes)):
        if repeats[place] != 1 and result is not None:
            result = _undo(space, call, result, place, repeats[place], copies_last=False)
    return None if result is None else result[len(axes) - rank :]


def _undo(
    space: AxisSpace, call: relax.Call, axes: Axes, place: int, copies: int, copies_last: bool
) -> Axes | None:
    """Take the copies out of an axis of the result."""
    shape = shape_of(call.args[0])
    if shape is None:
        return None
    size = shape[place - len(axes)]
    parts = space.align(axes[place], [size, copies] if copies_last else [copies, size])
    if parts is None:
        return None
    return (*axes[:place], parts[0 if copies_last else 1], *axes[place + 1 :])


def _from_copies(flow: Dataflow, space: AxisSpace, call: relax.Call, axes: Axes) -> View | None:
    """A tensor concatenated with itself is tiled."""
    fields = [flow.root(field) for field in flow.fields(call.args[0])]
    if len(fields) < 2 or any(not field.same_as(fields[0]) for field in fields) or call.attrs.axis is None:
        return None
    shape, place = shape_of(fields[0]), int(call.attrs.axis) % len(axes)
    parts = shape and space.align(axes[place], [len(fields), shape[place]])
    return (fields[0], (*axes[:place], parts[1], *axes[place + 1 :])) if parts else None


def _taken(flow: Dataflow, space: AxisSpace, call: relax.Call, axes: Axes) -> Axes | None:
    """Return the source's axes where constant indices repeat each entry, or the whole axis, a number of times."""
    index, shape = flow.value(call.args[1]), shape_of(call.args[0])
    if not isinstance(index, tvm.ir.GenericConst) or shape is None or call.attrs.axis is None:
        return None
    place = int(call.attrs.axis) % len(shape)
    size, taken = shape[place], index.value.numpy()
    if not isinstance(size, tvm.tirx.IntImm):
        return None
    count = int(size)
    taken = np.where(taken < 0, taken + count, taken) if str(call.attrs.mode) != "clip" else taken
    if taken.ndim == 0:  # takes the axis away
        return (*axes[:place], (), *axes[place:]) if count == 1 else None
    if taken.ndim != 1 or len(taken) % count:
        return None
    copies = len(taken) // count
    if (taken == np.repeat(np.arange(count), copies)).all():
        parts = space.align(axes[place], [count, copies])
        return parts and (*axes[:place], parts[0], *axes[place + 1 :])
    if (taken == np.tile(np.arange(count), copies)).all():
        parts = space.align(axes[place], [copies, count])
        return parts and (*axes[:place], parts[1], *axes[place + 1 :])
    return None


_STEPS: dict[str, _Step] = {
    "permute_dims": _permute,
    "reshape": _reshape,
    "flatten": _reshape,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "broadcast_to": _broadcast,
    "repeat": _repeat,
    "tile": _tile,
}
LAYOUT_OPS = (*_STEPS, "take", "concat")
