"""Operators that change a tensor's shape or make one of a shape; shapes may hold expressions in the dynamic sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.known_value import shape_of
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter


def known_sizes(node: OnnxNode, index: int, what: str) -> list[Any]:
    """The elements of an operand that must be known: ints and expressions."""
    value = node.known(index)
    if value is None:
        raise UnsupportedNode(f"its {what} depends on the model's data")
    return value.elements()


def known_integers(node: OnnxNode, index: int, what: str) -> list[int]:
    """The elements of an operand that must be known numbers."""
    sizes = known_sizes(node, index, what)
    if any(isinstance(size, tvm.ir.Expr) for size in sizes):
        raise UnsupportedNode(f"its {what} depends on dynamic sizes")
    return [int(size) for size in sizes]


def known_axes(node: OnnxNode, index: int = 1) -> list[int] | None:
    """Axes, from an operand (newer versions) or an attribute; None if the node has neither."""
    if node.value(index) is not None:
        return known_integers(node, index, "axes")
    axes = node.attribute("axes")
    return None if axes is None else list(axes)


def sizes_of(value: relax.Expr) -> list[Any]:
    """The sizes of a tensor of the function."""
    sizes = shape_of(value)
    if sizes is None:
        raise UnsupportedNode("the shape of its operand is not known at import")
    return sizes


@onnx_converter(STANDARD, "Constant")
def _constant(node: OnnxNode) -> Any:
    for name, dtype in (
        ("value", None),
        ("value_float", "float32"),
        ("value_int", "int64"),
        ("value_floats", "float32"),
        ("value_ints", "int64"),
    ):
        if name in node.attributes:
            value = node.attributes[name]
            return node.state.constant(node.outputs[0], np.asarray(value, dtype))
    raise UnsupportedNode(f"a constant given by {', '.join(node.attributes) or 'nothing'} cannot be imported")


@onnx_converter(STANDARD, "Reshape", since=5)
def _reshape(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    sizes, wanted = sizes_of(x), known_sizes(node, 1, "shape")
    keep = not node.attribute("allowzero", 0)
    for axis, size in enumerate(wanted):
        if keep and isinstance(size, int) and size == 0:
            if axis >= len(sizes):
                raise UnsupportedNode(f"its shape copies axis {axis} of a tensor with {len(sizes)} axes")
            wanted[axis] = sizes[axis]
    free = [axis for axis, size in enumerate(wanted) if isinstance(size, int) and size == -1]
    if len(free) > 1 or any(isinstance(size, int) and size < -1 for size in wanted):
        raise UnsupportedNode(f"its shape {wanted} is impossible")
    if free:
        wanted[free[0]] = _rest(node, sizes, [size for axis, size in enumerate(wanted) if axis != free[0]])
    return R.reshape(x, wanted)


def _rest(node: OnnxNode, sizes: list[Any], others: list[Any]) -> Any:
    """The size that is left when the elements of ``sizes`` are laid out in ``others``."""
    sizes, others = list(sizes), list(others)
    for other in list(others):  # sizes on both sides cancel
        same = next((i for i, size in enumerate(sizes) if node.state.equal(size, other)), None)
        if same is not None:
            del sizes[same]
            others.remove(other)
    factor = math.prod(size for size in sizes if isinstance(size, int))
    divisor = math.prod(size for size in others if isinstance(size, int))
    total, known = (
        _product([s for s in sizes if not isinstance(s, int)]),
        _product([s for s in others if not isinstance(s, int)]),
    )
    if isinstance(known, int) and divisor and factor % divisor == 0:
        return node.state.simplify(total * (factor // divisor))
    if not divisor:
        raise UnsupportedNode("its shape has a size that nothing tells")
    return node.state.simplify(tirx.floordiv(_expression(total * factor), _expression(known * divisor)))


def _product(sizes: list[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _expression(size: Any) -> Any:
    return size if isinstance(size, tvm.ir.Expr) else tirx.const(size, "int64")


@onnx_converter(STANDARD, "Unsqueeze")
def _unsqueeze(node: OnnxNode) -> relax.Expr:
    x, axes = node.input(0), known_axes(node)
    rank = len(sizes_of(x)) + len(axes or [])
    if not axes or len({axis % rank for axis in axes}) != len(axes) or any(not -rank <= axis < rank for axis in axes):
        raise UnsupportedNode(f"its axes {axes} do not fit {rank - len(axes or [])} axes")
    return R.expand_dims(x, sorted(axis % rank for axis in axes))


@onnx_converter(STANDARD, "Squeeze")
def _squeeze(node: OnnxNode) -> relax.Expr:
    x, axes = node.input(0), known_axes(node)
    sizes = sizes_of(x)
    if axes is None:
        if not all(isinstance(size, int) for size in sizes):
            raise UnsupportedNode("it drops axes of size 1 where sizes are dynamic; give it axes")
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
    axes = [axis % max(len(sizes), 1) for axis in axes]
    if any(axis >= len(sizes) or not node.state.equal(sizes[axis], 1) for axis in axes):
        raise UnsupportedNode(f"it drops the axes {axes} of a tensor of shape {sizes}, which are not of size 1")
    return R.squeeze(x, axes) if axes else x


@onnx_converter(STANDARD, "Flatten")
def _flatten(node: OnnxNode) -> relax.Expr:
    x, axis = node.input(0), node.attribute("axis", 1)
    sizes = sizes_of(x)
    axis = axis + len(sizes) if axis < 0 else axis
    return R.reshape(x, [node.state.simplify(_product(part)) for part in (sizes[:axis], sizes[axis:])])


@onnx_converter(STANDARD, "Transpose")
def _transpose(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    axes = list(node.attribute("perm") or range(len(sizes_of(x)))[::-1])
    return x if axes == list(range(len(axes))) else R.permute_dims(x, axes)


@onnx_converter(STANDARD, "Expand", since=8)
def _expand(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    sizes, wanted = sizes_of(x), known_sizes(node, 1, "shape")
    rank = max(len(sizes), len(wanted))
    pairs = zip([1] * (rank - len(sizes)) + sizes, [1] * (rank - len(wanted)) + wanted, strict=True)
    target = [broadcast_size(node, a, b) for a, b in pairs]
    same = len(target) == len(sizes) and all(node.state.equal(a, b) for a, b in zip(target, sizes, strict=True))
    return x if same else R.broadcast_to(x, target)


def broadcast_size(node: OnnxNode, a: Any, b: Any) -> Any:
    """The size of an axis when a tensor of size ``a`` along it meets one of size ``b``."""
    if isinstance(a, int) and a == 1:
        return b
    if (isinstance(b, int) and b == 1) or node.state.equal(a, b):
        return a
    raise UnsupportedNode(f"the sizes {a} and {b} may differ, and it would repeat one of them only if it is 1")


@onnx_converter(STANDARD, "ConstantOfShape", since=9)
def _constant_of_shape(node: OnnxNode) -> relax.Expr:
    fill = np.asarray(node.attribute("value", np.zeros(1, np.float32))).reshape(())
    return R.full(relax.ShapeExpr(known_sizes(node, 0, "shape")), relax.const(fill, fill.dtype.name), fill.dtype.name)


@onnx_converter(STANDARD, "Range", since=11)
def _range(node: OnnxNode) -> relax.Expr:
    bounds = [known_sizes(node, index, "bound")[0] for index in range(3)]
    dtype = node.values[0].dtype  # type: ignore[union-attr]
    return R.arange(*bounds, dtype)


@onnx_converter(STANDARD, "Concat", since=4)
def _concat(node: OnnxNode) -> relax.Expr:
    axis = node.attributes["axis"]
    parts = [part for part in node.inputs if not node.state.equal(sizes_of(part)[axis], 0)] or node.inputs[:1]
    return R.concat(parts, axis) if len(parts) > 1 else parts[0]


@onnx_converter(STANDARD, "Split", since=2)
def _split(node: OnnxNode) -> Any:
    x, axis = node.input(0), node.attribute("axis", 0)
    size = sizes_of(x)[axis]
    parts = node.attribute("split")
    if node.value(1) is not None:
        parts = known_integers(node, 1, "list of sizes")
    if parts is None:
        count = node.attribute("num_outputs", len(node.outputs))
        if not isinstance(size, int):
            raise UnsupportedNode("it splits an axis of dynamic size into equal parts")
        chunk = -(-size // count)
        parts = [chunk] * (count - 1) + [size - chunk * (count - 1)]
    if not isinstance(size, int) or sum(parts) != size or any(part < 0 for part in parts):
        raise UnsupportedNode(f"its parts {list(parts)} do not fill an axis of size {size}")
    if len(parts) == 1:
        return x
    pieces = node.emit(R.split(x, [int(end) for end in np.cumsum(parts)[:-1]], axis))
    return [node.emit(relax.TupleGetItem(pieces, index)) for index in range(len(parts))]


@onnx_converter(STANDARD, "Tile", since=6)
def _tile(node: OnnxNode) -> relax.Expr:
    x, repeats = node.input(0), known_sizes(node, 1, "list of repeats")
    sizes = sizes_of(x)
    if len(repeats) != len(sizes):
        raise UnsupportedNode(f"it repeats {len(repeats)} axes of a tensor with {len(sizes)}")
    if all(isinstance(repeat, int) and repeat == 1 for repeat in repeats):
        return x
    ones = [(isinstance(repeat, int) and repeat == 1) or size == 1 for repeat, size in zip(repeats, sizes, strict=True)]
    if all(ones):  # a size of 1 repeated is a broadcast, which takes dynamic sizes
        target = [
            size if isinstance(repeat, int) and repeat == 1 else repeat
            for repeat, size in zip(repeats, sizes, strict=True)
        ]
        return R.broadcast_to(x, target)
    return R.tile(x, known_integers(node, 1, "list of repeats"))
