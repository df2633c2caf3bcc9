"""Operators that move elements, on tensors whose elements are known at import; see ``known_operators``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rotquant_tvm.frontend.onnx_import.known_operators import Array, folds
from rotquant_tvm.frontend.onnx_import.known_value import MAX_ELEMENTS, KnownValue
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode

# Results are indexed out of the operand, so that expressions are moved like numbers.


def _moved(value: KnownValue, array: Array) -> KnownValue:
    return KnownValue.of(array, value.dtype)


def _integers(value: Any) -> list[int] | None:
    """The elements of an operand that must be numbers."""
    return [int(each) for each in value.elements()] if value.is_number else None


@folds("Gather")
def _gather(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    data, index = values
    if not index.is_number or math.prod(data.array.shape) * max(index.array.size, 1) > MAX_ELEMENTS:
        return None
    return _moved(data, np.asarray(np.take(data.array, index.array, axis=node.attribute("axis", 0))))


@folds("Concat")
def _concat(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    if sum(value.array.size for value in values) > MAX_ELEMENTS:
        return None
    numbers = all(value.is_number for value in values)
    arrays = [value.array if numbers else value.objects() for value in values]
    return _moved(values[0], np.concatenate(arrays, axis=node.attributes["axis"]))


@folds("Slice")
def _slice(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    data, *bounds = values
    if bounds:
        lists = [None if bound is None else _integers(bound) for bound in bounds]
        starts, ends, axes, steps = (*lists, None, None)[:4]
    else:  # before opset 10
        starts, ends = list(node.attributes["starts"]), list(node.attributes["ends"])
        axes, steps = list(node.attribute("axes", range(len(starts)))), None
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index: list[Any] = [slice(None)] * data.array.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = _python_slice(start, end, step, data.array.shape[axis])
    return _moved(data, data.array[tuple(index)])


def _python_slice(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's bounds as Python's: a negative one counts from the end once, and one before the start stays there."""
    if step > 0:
        return slice(*slice(start, end, step).indices(size))
    first, last, step = slice(start, end, step).indices(size)
    return slice(first, None if last < 0 else last, step)


@folds("Unsqueeze")
def _unsqueeze(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    axes = _integers(values[1]) if len(values) > 1 else list(node.attributes["axes"])
    return None if axes is None else _moved(values[0], np.expand_dims(values[0].array, tuple(axes)))


@folds("Squeeze")
def _squeeze(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    axes = node.attribute("axes")
    if len(values) > 1 and values[1] is not None:
        axes = _integers(values[1])
    return _moved(values[0], np.squeeze(values[0].array, None if axes is None else tuple(axes)))


@folds("Reshape")
def _reshape(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    sizes = _integers(values[1])
    if sizes is None:
        return None
    shape = values[0].array.shape
    if not node.attribute("allowzero", 0):
        sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return _moved(values[0], values[0].array.reshape(sizes))


@folds("Transpose")
def _transpose(node: OnnxNode, values: list[Any]) -> KnownValue:
    return _moved(values[0], np.transpose(values[0].array, node.attribute("perm")))


@folds("Expand")
def _expand(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    sizes = _integers(values[1])
    if sizes is None or any(size < 0 for size in sizes):
        return None
    shape = np.broadcast_shapes(values[0].array.shape, (1,) * len(sizes))
    wanted = [
        max(a, b) if min(a, b) else 0 for a, b in zip(shape, [1] * (len(shape) - len(sizes)) + sizes, strict=True)
    ]
    if math.prod(wanted) > MAX_ELEMENTS:
        return None
    return _moved(values[0], np.broadcast_to(values[0].array, wanted))


@folds("Tile")
def _tile(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    repeats = _integers(values[1])
    if repeats is None or values[0].array.size * math.prod(repeats) > MAX_ELEMENTS:
        return None
    return _moved(values[0], np.tile(values[0].array, repeats))


@folds("ConstantOfShape")
def _constant_of_shape(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    sizes = _integers(values[0])
    if sizes is None or any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        return None
    fill = np.asarray(node.attribute("value", np.zeros(1, np.float32))).reshape(())
    return KnownValue.of(np.full(sizes, fill, fill.dtype))


@folds("Range")
def _range(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    if not all(value.is_number for value in values):
        return None
    start, limit, delta = (value.array.item() for value in values)
    if not delta or not math.isfinite((limit - start) / delta):
        return None
    count = max(math.ceil((limit - start) / delta), 0)
    if count > MAX_ELEMENTS:
        return None
    return KnownValue.of(start + np.arange(count) * delta, values[0].dtype)


@folds("Split")
def _split(node: OnnxNode, values: list[Any]) -> list[KnownValue] | None:
    data, axis = values[0], node.attribute("axis", 0)
    sizes = node.attribute("split")
    if len(values) > 1 and values[1] is not None:
        sizes = _integers(values[1])
    if sizes is None:
        count = node.attribute("num_outputs", len(node.outputs))
        chunk = -(-data.array.shape[axis] // count)
        sizes = [chunk] * (count - 1) + [data.array.shape[axis] - chunk * (count - 1)]
    if sum(sizes) != data.array.shape[axis] or any(size < 0 for size in sizes):
        return None
    return [_moved(data, each) for each in np.split(data.array, np.cumsum(sizes)[:-1], axis)]


@folds("ScatterND")
def _scatter_nd(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    data, indices, updates = values
    if not indices.is_number or node.attribute("reduction", "none") != "none":
        return None
    result = (data.array if updates.is_number else data.objects()).copy()
    if not data.is_number and updates.is_number:
        updates = KnownValue(updates.objects(), updates.dtype)
    for index in np.ndindex(indices.array.shape[:-1]):
        result[tuple(indices.array[index])] = updates.array[index]
    return _moved(data, result)
