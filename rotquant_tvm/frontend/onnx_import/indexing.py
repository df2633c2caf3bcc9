"""Operators that read or write parts of a tensor."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.arithmetic import dtype_of
from rotquant_tvm.frontend.onnx_import.known_value import KnownValue, object_array
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import known_integers, known_sizes, sizes_of

_FAR = 1 << 31
"""Bounds from here on mean "to the end"."""
_SAME_NUMBERS = ("relax.astype", "relax.expand_dims", "relax.squeeze", "relax.reshape")


@onnx_converter(STANDARD, "Slice", since=10)
def _slice(node: OnnxNode) -> relax.Expr:
    starts, ends = known_sizes(node, 1, "start"), known_sizes(node, 2, "end")
    axes = known_integers(node, 3, "axes") if node.value(3) is not None else list(range(len(starts)))
    steps = known_integers(node, 4, "steps") if node.value(4) is not None else [1] * len(starts)
    return _cut(node, starts, ends, axes, steps)


@onnx_converter(STANDARD, "Slice")
def _slice_by_attributes(node: OnnxNode) -> relax.Expr:
    starts, ends = list(node.attributes["starts"]), list(node.attributes["ends"])
    return _cut(node, starts, ends, list(node.attribute("axes", range(len(starts)))), [1] * len(starts))


def _cut(node: OnnxNode, starts: list[Any], ends: list[Any], axes: list[int], steps: list[int]) -> relax.Expr:
    x = node.input(0)
    sizes = sizes_of(x)
    if not len(starts) == len(ends) == len(axes) == len(steps) or any(not -len(sizes) <= a < len(sizes) for a in axes):
        raise UnsupportedNode(f"its bounds {starts}, {ends} on axes {axes} do not fit {len(sizes)} axes")
    cuts = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(sizes)
        if step == -1 and _is_whole(start, end, sizes[axis]):
            x = node.emit(R.flip(x, axis))
            continue
        if step < 1:
            raise UnsupportedNode(f"steps of {step} are not supported")
        first, last = _bounds(node, start, end, sizes[axis])
        if not (node.state.equal(first, 0) and node.state.equal(last, sizes[axis]) and step == 1):
            cuts.append((axis, first, last, step))
    if not cuts:
        return x
    cut_axes, first_ones, last_ones, cut_steps = (list(part) for part in zip(*cuts, strict=True))
    return R.strided_slice(x, cut_axes, first_ones, last_ones, cut_steps, assume_inbound=True)


def _is_whole(start: Any, end: Any, size: Any) -> bool:
    """Whether bounds of a step of -1 take the axis from its end to its start."""
    numbers = isinstance(start, int) and isinstance(end, int)
    return numbers and end <= -_FAR and (start == -1 or start >= _FAR or (isinstance(size, int) and start >= size - 1))


def _bounds(node: OnnxNode, start: Any, end: Any, size: Any) -> tuple[Any, Any]:
    """Bounds within 0 and ``size``, the first not above the second."""
    start, end = _from_start(node, start, size), _from_start(node, end, size)
    proved = node.state.proved
    if not proved(_le(end, size)):
        end = _limited(node, end, size)
    if not proved(_le(start, end)):
        if not isinstance(start, int) or start:
            start = _least(node, start, end)
    return start, end


def _from_start(node: OnnxNode, bound: Any, size: Any) -> Any:
    """A bound counted from the start: a negative one counts from the end."""
    if isinstance(bound, int):
        if bound >= _FAR:
            return size
        return bound if bound >= 0 else 0 if bound <= -_FAR else _not_negative(node, bound + size)
    if node.state.proved(_le(0, bound)):
        return bound
    if node.state.proved(_le(bound, -1)):
        return _not_negative(node, bound + size)
    raise UnsupportedNode(f"its bound {bound} may be negative or not, which mean different things")


def _not_negative(node: OnnxNode, bound: Any) -> Any:
    bound = node.state.simplify(bound)
    if isinstance(bound, int):
        return max(bound, 0)
    return bound if node.state.proved(_le(0, bound)) else node.state.simplify(tirx.max(bound, _int64(0)))


def _limited(node: OnnxNode, end: Any, size: Any) -> Any:
    """An end that may lie behind the axis's.

    A table of fixed size cut to the length of the sequence has all positions that the model has: sequences
    stay within it, which is noted.
    """
    total = node.state.total
    if isinstance(size, int) and total is not None and not isinstance(end, int) and node.state.equal(end, total):
        node.state.limits.append((end, size))
        return end
    return _least(node, end, size)


def _least(node: OnnxNode, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return node.state.simplify(tirx.min(_int64(a), _int64(b)))


def _int64(size: Any) -> Any:
    return size if isinstance(size, tvm.ir.Expr) else tirx.const(size, "int64")


def _le(a: Any, b: Any) -> Any:
    return a <= b if isinstance(a, int) and isinstance(b, int) else tirx.LE(_int64(a), _int64(b))


@onnx_converter(STANDARD, "Gather")
def _gather(node: OnnxNode) -> relax.Expr:
    """Take along an axis. Negative indices count from the end, which "wrap" does; ids and positions are never."""
    data, axis = node.input(0), node.attribute("axis", 0)
    axis %= len(sizes_of(data))
    index = node.known(1)
    if index is not None and index.is_number:
        return R.take(data, _from_zero(node, index, sizes_of(data)[axis]), axis, mode="wrap")
    return _taken(node, data, node.input(1), axis)


def _taken(node: OnnxNode, data: relax.Expr, index: relax.Expr, axis: int) -> relax.Expr:
    return R.take(data, index, axis, mode="clip" if _counts_tokens(node, index) else "wrap")


def _from_zero(node: OnnxNode, index: KnownValue, size: Any) -> relax.Expr:
    """Known indices counted from the start, where the axis has a known size."""
    if not isinstance(size, int):
        return node.state.tensor(index)
    if ((index.array < -size) | (index.array >= size)).any():
        raise UnsupportedNode(f"it reads behind the end of an axis of size {size}")
    return relax.const(index.array % max(size, 1), index.dtype)


def _counts_tokens(node: OnnxNode, index: relax.Expr) -> bool:
    """Whether an index is the input of ids or that of positions, perhaps in another integer type or shape."""
    while isinstance(index, relax.Var):
        value = node.state.builder.lookup_binding(index)
        if value is None:
            return any(index.same_as(var) for var in node.state.token_inputs)
        if not (isinstance(value, relax.Call) and getattr(value.op, "name", "") in _SAME_NUMBERS):
            return False
        index = value.args[0]
    return False


@onnx_converter(STANDARD, "GatherElements", since=11)
def _gather_elements(node: OnnxNode) -> relax.Expr:
    axis = node.attribute("axis", 0)
    return R.gather_elements(node.input(0), _counted(node, [sizes_of(node.input(0))[axis]]), axis=axis)


@onnx_converter(STANDARD, "GatherND", since=11)
def _gather_nd(node: OnnxNode) -> relax.Expr:
    """Along one axis it is a lookup of rows, as torch's exporter writes ``table[ids]``."""
    data, batch = node.input(0), node.attribute("batch_dims", 0)
    sizes, known = _indexed_sizes(node, batch), node.known(1)
    if batch or len(sizes) != 1:
        return R.gather_nd(data, _counted(node, sizes), batch_dims=batch)
    if known is not None and known.is_number:
        rows = KnownValue.of(known.array[..., 0], known.dtype)
        return R.take(data, _from_zero(node, rows, sizes[0]), 0, mode="wrap")
    return _taken(node, data, node.emit(R.squeeze(node.input(1), -1)), 0)


def _indexed_sizes(node: OnnxNode, batch: int = 0) -> list[Any]:
    """The sizes of the axes that the rows of an index tensor count along."""
    axes = sizes_of(node.input(1))[-1]
    if not isinstance(axes, int) or batch + axes > len(sizes_of(node.input(0))):
        raise UnsupportedNode(f"its indices have {axes} columns, which do not fit its operand")
    return sizes_of(node.input(0))[batch : batch + axes]


def _counted(node: OnnxNode, sizes: list[Any]) -> relax.Expr:
    """The indices of input 1 counted from the start; negative ones count from the end of axes of these sizes."""
    index = node.known(1)
    if index is not None and index.is_number and (index.array >= 0).all():
        return node.input(1)
    values = node.input(1)
    ends = node.state.tensor(KnownValue.of(object_array(sizes), dtype_of(values)))
    behind = node.emit(R.less(values, relax.const(0, dtype_of(values))))
    return node.emit(R.where(behind, node.emit(R.add(values, ends)), values))


_REDUCTIONS = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}


def _reduction(node: OnnxNode) -> str:
    reduction = node.attribute("reduction", "none")
    if reduction not in _REDUCTIONS:
        raise UnsupportedNode(f"reduction={reduction!r} is not known")
    return _REDUCTIONS[reduction]


@onnx_converter(STANDARD, "ScatterElements", since=11)
def _scatter_elements(node: OnnxNode) -> relax.Expr:
    axis = node.attribute("axis", 0)
    index = _counted(node, [sizes_of(node.input(0))[axis]])
    return R.scatter_elements(node.input(0), index, node.input(2), axis=axis, reduction=_reduction(node))


@onnx_converter(STANDARD, "ScatterND", since=11)
def _scatter_nd(node: OnnxNode) -> relax.Expr:
    index = _counted(node, _indexed_sizes(node))
    return R.scatter_nd(node.input(0), index, node.input(2), reduction=_reduction(node))


@onnx_converter(STANDARD, "TensorScatter", since=24)
def _tensor_scatter(node: OnnxNode) -> relax.Expr:
    """A cache of fixed length with each sequence's new entries written behind those that it has."""
    cache, update, start = (node.input(index) for index in range(3))
    sizes, new = sizes_of(cache), sizes_of(update)
    axis = node.attribute("axis", -2) % len(sizes)
    if node.attribute("mode", "linear") != "linear":
        raise UnsupportedNode("mode='circular' is not supported; export the model with a cache that grows")
    if axis == 0 or len(new) != len(sizes):
        raise UnsupportedNode("its axis and operands do not fit")
    index = node.emit(R.arange(0, new[axis], 1, "int64"))
    index = node.emit(R.reshape(index, [new[axis] if i == axis else 1 for i in range(len(sizes))]))
    if start is not None:
        wide = start if dtype_of(start) == "int64" else node.emit(R.astype(start, "int64"))
        first = node.emit(R.reshape(wide, [new[0], *[1] * (len(sizes) - 1)]))
        index = node.emit(R.add(index, first))
    index = node.emit(R.broadcast_to(index, new))
    return R.scatter_elements(cache, index, update, axis=axis, reduction="update")


@onnx_converter(STANDARD, "Trilu", since=14)
def _trilu(node: OnnxNode) -> relax.Expr:
    diagonal = known_sizes(node, 1, "diagonal")[0] if node.value(1) is not None else 0
    triangle = R.triu if node.attribute("upper", 1) else R.tril
    x = node.input(0)
    if dtype_of(x) != "bool":
        return triangle(x, diagonal)
    return R.astype(node.emit(triangle(node.emit(R.astype(x, "int32")), diagonal)), "bool")
