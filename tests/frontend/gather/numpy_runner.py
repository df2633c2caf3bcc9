"""Relax functions in NumPy, operator by operator, attention by its definition; compiling would take seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx


def run_in_numpy(function: relax.Function, inputs: list[np.ndarray], softcaps: list[float] | None = None) -> list:
    """The results of ``function``; ``softcaps`` one per attention call, in order."""
    return _Run(function, inputs, iter(softcaps or [])).results()


class _Run:
    def __init__(self, function: relax.Function, inputs: list[np.ndarray], softcaps: Any) -> None:
        self.function, self.softcaps = function, softcaps
        self.values: dict[relax.Var, Any] = {}
        self.analyzer, known = tvm.sym.Analyzer(), []
        for parameter, array in zip(function.params, inputs, strict=True):
            for size, actual in zip(parameter.ty.shape.values, array.shape, strict=True):
                if isinstance(size, tirx.Var) and size not in known:
                    self.analyzer.bind(size, tirx.IntImm("int64", actual))
                    known.append(size)
            self.values[parameter] = array
        for parameter, array in zip(function.params, inputs, strict=True):
            assert array.shape == tuple(map(self.size, parameter.ty.shape.values)), parameter

    def results(self) -> list[np.ndarray]:
        for block in self.function.body.blocks:
            for binding in block.bindings:
                value = self.value(binding.value)
                self.values[binding.var] = value
                if isinstance(value, np.ndarray) and binding.var.ty.shape is not None:
                    assert value.shape == tuple(map(self.size, binding.var.ty.shape.values)), binding.var
        result = self.values[self.function.body.body]
        return list(result) if isinstance(result, tuple | list) else [result]

    def size(self, size: Any) -> int:
        return int(size if isinstance(size, int) else self.analyzer.simplify(size))

    def value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var) and expr in self.values:
            return self.values[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return [self.value(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return [self.size(size) for size in expr.values]
        if not isinstance(expr, relax.Call):
            return float(expr.value) if isinstance(expr, tirx.FloatImm) else self.size(expr)
        name = expr.op.name.removeprefix("relax.")
        args = [self.value(argument) for argument in expr.args]
        with np.errstate(all="ignore"):
            if name.startswith("nn.attention"):
                result = _attention(expr.attrs, next(self.softcaps, 0.0), *args)
            else:
                result = OPERATORS[name](expr.attrs, *args)
        dtype = getattr(expr.ty, "dtype", None)
        return result if dtype is None else np.asarray(result).astype(str(getattr(dtype, "dtype", dtype)))


def _attention(attrs: Any, cap: float, q: Any, k: Any, v: Any, bias: Any = 0.0) -> np.ndarray:
    assert not attrs.causal_mask and not attrs.window_size
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype("float64") for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, group, 2)) * float(attrs.scale)
    scores = cap * np.tanh(scores / cap) if cap else scores
    weights = _softmax(scores + np.asarray(bias, "float64"), -1)
    return np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(v, group, 2))


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def _strided_slice(attrs: Any, x: np.ndarray, axes: Any, begin: Any, end: Any, strides: Any = None) -> np.ndarray:
    index = [slice(None)] * x.ndim
    for place, axis in enumerate(axes):
        index[axis] = slice(begin[place], end[place], strides[place] if strides else None)
    return x[tuple(index)]


def _axes(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(axis) for axis in values)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda attrs, x: function(x, axis=_axes(attrs.axis), keepdims=bool(attrs.keepdims))


_PLAIN = {
    **{name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum")},
    **{name: getattr(np, name) for name in ("negative", "sqrt", "exp", "tanh", "isnan", "isinf", "equal", "not_equal")},
    **{name: getattr(np, name) for name in ("less", "less_equal", "greater", "greater_equal", "where", "square")},
    **{name: getattr(np, name) for name in ("logical_and", "logical_or", "logical_not", "matmul", "reshape")},
    **{name: getattr(np, name) for name in ("broadcast_to", "clip", "zeros_like", "ones_like", "full_like", "full")},
    "bitwise_not": np.invert,
    "bitwise_and": np.bitwise_and,
    "nn.relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "shape_of": lambda x: list(x.shape),
    "shape_to_tensor": lambda x: np.array(x, "int64"),
    "dynamic_strided_slice": lambda x, begin, end, by: x[tuple(map(slice, begin, end, by))],
    "arange": np.arange,
    "zeros": np.zeros,
    "ones": np.ones,
}

OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: lambda attrs, *args, _function=function: _function(*args) for name, function in _PLAIN.items()},
    "astype": lambda attrs, x: x,
    "concat": lambda attrs, parts: np.concatenate(parts, int(attrs.axis)),
    "einsum": lambda attrs, parts: np.einsum(str(attrs.subscripts), *parts),
    "expand_dims": lambda attrs, x: np.expand_dims(x, _axes(attrs.axis)),
    "flatten": lambda attrs, x: x.reshape(-1),
    "max": _reduce(np.max),
    "min": _reduce(np.min),
    "sum": _reduce(np.sum),
    "mean": _reduce(np.mean),
    "nn.softmax": lambda attrs, x: _softmax(x, int(attrs.axis)),
    "permute_dims": lambda attrs, x: np.transpose(x, _axes(attrs.axes)),
    "repeat": lambda attrs, x: np.repeat(x, int(attrs.repeats), int(attrs.axis)),
    "split": lambda attrs, x: np.split(x, _axes(attrs.indices_or_sections), int(attrs.axis)),
    "squeeze": lambda attrs, x: np.squeeze(x, _axes(attrs.axis)),
    "strided_slice": _strided_slice,
    "take": lambda attrs, x, index: np.take(x, index, int(attrs.axis)),
    "tile": lambda attrs, x: np.tile(x, _axes(attrs.repeats)),
    "tril": lambda attrs, x, k: np.tril(x, k),
    "triu": lambda attrs, x, k: np.triu(x, k),
}
