"""Relax's operators that make, move, look up and reduce arrays, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from rotquant_tvm.frontend.normalize.operator_table import Operator, axes_of, axis_of


def _strided_slice(attrs: Any, x: Any, axes: Any, begin: Any, end: Any, strides: Any = None) -> Any:
    index = [slice(None)] * x.ndim
    for place, axis in enumerate(axes):
        index[axis] = slice(begin[place], end[place], strides[place] if strides else 1)
    return x[tuple(index)]


def _dynamic_strided_slice(_: Any, x: Any, begin: Any, end: Any, strides: Any) -> Any:
    ranges = zip(begin, end, strides, strict=True)
    return x[tuple(slice(int(first), int(stop), int(step)) for first, stop, step in ranges)]


def _take(attrs: Any, x: Any, index: Any) -> Any:
    index, mode = np.asarray(index), str(attrs.mode)
    if mode == "fast" and (index < 0).any():
        raise IndexError("an index is negative")
    take: Any = np.take
    return take(x, index, axis_of(attrs), mode={"fast": "raise"}.get(mode, mode))


def _split(attrs: Any, x: Any) -> Any:
    where = attrs.indices_or_sections
    where = [int(i) for i in where] if hasattr(where, "__len__") else int(where)
    return np.array_split(x, where, axis=int(attrs.axis))


def _gather_nd(attrs: Any, x: Any, index: Any) -> Any:
    batch = int(attrs.batch_dims)
    if batch == 0:
        return x[tuple(np.moveaxis(index, -1, 0))]
    rows = [_gather_nd_row(row, at, batch - 1) for row, at in zip(x, index, strict=True)]
    return np.stack(rows) if rows else np.zeros((0, *index.shape[1:-1]), x.dtype)


def _gather_nd_row(x: Any, index: Any, batch: int) -> Any:
    if batch == 0:
        return x[tuple(np.moveaxis(index, -1, 0))]
    return np.stack([_gather_nd_row(row, at, batch - 1) for row, at in zip(x, index, strict=True)])


def _only_update(reduction: Any) -> None:
    if str(reduction) != "update":
        raise ValueError(f"scattering with the reduction {reduction}")


def _scatter_elements(attrs: Any, x: Any, index: Any, updates: Any) -> Any:
    _only_update(attrs.reduction)
    result = np.array(x)
    np.put_along_axis(result, np.asarray(index), updates, axis_of(attrs))
    return result


def _scatter_nd(attrs: Any, x: Any, index: Any, updates: Any) -> Any:
    _only_update(attrs.reduction)
    result = np.array(x)
    result[tuple(np.moveaxis(index, -1, 0))] = updates
    return result


def _index_put(attrs: Any, x: Any, index: Any, values: Any) -> Any:
    if attrs.accumulate:
        raise ValueError("accumulating")
    result = np.array(x)
    result[tuple(index) if isinstance(index, list) else index] = values
    return result


def _cumulative(function: Any) -> Operator:
    def operator(attrs: Any, x: Any) -> Any:
        axis = axis_of(attrs)
        x, axis = (x.ravel(), 0) if axis is None else (x, axis)
        result = function(x.astype(np.int64) if x.dtype == bool else x, axis=axis)
        if not attrs.exclusive:
            return result
        first = np.full_like(np.take(result, [0], axis), 1 if function is np.cumprod else 0)
        return np.concatenate([first, np.take(result, range(x.shape[axis] - 1), axis)], axis)

    return operator


def _reduction(function: Any) -> Operator:
    return lambda attrs, x: function(x, axis=axes_of(attrs), keepdims=bool(attrs.keepdims))


def _arg(function: Any) -> Operator:
    return lambda attrs, x: function(x, axis=axis_of(attrs), keepdims=bool(attrs.keepdims))


def _one_hot(attrs: Any, index: Any, on: Any, off: Any) -> Any:
    hot = np.arange(int(attrs.depth)) == np.asarray(index)[..., None]
    axis = axis_of(attrs)
    return np.moveaxis(np.where(hot, on, off), -1, -1 if axis is None else axis)


def _meshgrid(attrs: Any, parts: list[Any]) -> Any:
    meshgrid: Any = np.meshgrid
    return list(meshgrid(*parts, indexing=str(attrs.indexing or "ij")))


def _pad(attrs: Any, x: Any, value: Any = 0.0) -> Any:
    if str(attrs.pad_mode) != "constant":
        raise ValueError(f"padding of the kind {attrs.pad_mode}")
    widths = [int(width) for width in attrs.pad_width]
    return np.pad(x, list(zip(widths[::2], widths[1::2], strict=True)), constant_values=float(attrs.pad_value))


MAKING: dict[str, Operator] = {
    "arange": lambda _, start, end, step: np.arange(start, end, step),
    "eye": lambda _, n, m, k: np.eye(n, m, k),
    "full": lambda _, shape, fill: np.full(shape, fill),
    "full_like": lambda _, x, fill: np.full(x.shape, fill),
    "ones": lambda _, shape: np.ones(shape),
    "ones_like": lambda _, x: np.ones(x.shape),
    "shape_of": lambda _, x: tuple(x.shape),
    "shape_to_tensor": lambda _, shape: np.array(shape, np.int64),
    "size": lambda _, x: np.array(x.size, np.int64),
    "tensor_to_shape": lambda _, x: tuple(int(size) for size in x),
    "zeros": lambda _, shape: np.zeros(shape),
    "zeros_like": lambda _, x: np.zeros(x.shape),
    "one_hot": _one_hot,
}

MOVING: dict[str, Operator] = {
    "broadcast_to": lambda _, x, shape: np.broadcast_to(x, shape),
    "concat": lambda attrs, parts: np.concatenate(parts, axis_of(attrs)),
    "dynamic_strided_slice": _dynamic_strided_slice,
    "expand_dims": lambda attrs, x: np.expand_dims(x, axes_of(attrs) or ()),
    "flatten": lambda _, x: x.reshape(-1),
    "flip": lambda attrs, x: np.flip(x, axis_of(attrs)),
    "index_put": _index_put,
    "permute_dims": lambda attrs, x: np.transpose(x, axes_of(attrs, "axes")),
    "repeat": lambda attrs, x: np.repeat(x, int(attrs.repeats), axis_of(attrs)),
    "reshape": lambda _, x, shape: x.reshape(shape),
    "scatter_elements": _scatter_elements,
    "scatter_nd": _scatter_nd,
    "split": _split,
    "squeeze": lambda attrs, x: np.squeeze(x, axes_of(attrs)),
    "stack": lambda attrs, parts: np.stack(parts, axis_of(attrs) or 0),
    "strided_slice": _strided_slice,
    "take": _take,
    "tile": lambda attrs, x: np.tile(x, [int(n) for n in attrs.repeats]),
}

LOOKING_UP: dict[str, Operator] = {
    "gather_elements": lambda attrs, x, index: np.take_along_axis(x, index, axis_of(attrs)),
    "gather_nd": _gather_nd,
    "index_tensor": lambda _, x, index: x[tuple(index)],
    "meshgrid": _meshgrid,
    "nn.pad": _pad,
    "tril": lambda _, x, k: np.tril(x, k),
    "triu": lambda _, x, k: np.triu(x, k),
}

REDUCING: dict[str, Operator] = {
    "argmax": _arg(np.argmax),
    "argmin": _arg(np.argmin),
    "cumprod": _cumulative(np.cumprod),
    "cumsum": _cumulative(np.cumsum),
    "max": _reduction(np.max),
    "mean": _reduction(np.mean),
    "min": _reduction(np.min),
    "prod": _reduction(np.prod),
    "sum": _reduction(np.sum),
    "matmul": lambda _, x, y: np.matmul(x, y),
    "outer": lambda _, x, y: np.outer(x, y),
}

ARRAY_OPERATORS = MAKING | MOVING | LOOKING_UP | REDUCING
