"""The one value that all elements of a tensor have, where constants alone decide it."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import tvm
from tvm import relax

from .axes import shape_of
from .dataflow import Dataflow, dtype_of

_UNARY: dict[str, Callable[[float], float]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "negative": np.negative,
    "exp": np.exp,
    "log": np.log,
    "abs": np.abs,
}
_BINARY: dict[str, Callable[[float, float], float]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
_MOVED = ("reshape", "broadcast_to", "expand_dims", "squeeze", "permute_dims", "flatten", "repeat", "tile")


def uniform(flow: Dataflow, expr: relax.Expr) -> float | None:
    """Return the value of every element of ``expr`` if it follows from constants, else None.

    Computed in float64 and rounded where the function casts; sizes of axes count where they are numbers.
    """
    value = flow.value(expr)
    if isinstance(value, tvm.ir.GenericConst):
        elements = np.asarray(value.value.numpy(), np.float64).ravel()
        same = elements.size and ((elements == elements[0]).all() or np.isnan(elements).all())
        return float(elements[0]) if same else None
    call = flow.call(expr)
    if call is None:
        return None
    name = call.op.name.removeprefix("relax.")
    if name in ("zeros", "zeros_like", "ones", "ones_like"):
        return float(name.startswith("ones"))
    if name in ("full", "full_like"):
        return uniform(flow, call.args[1])
    if name in _MOVED:
        return uniform(flow, call.args[0])
    if name == "astype":
        inner = uniform(flow, call.args[0])
        return None if inner is None else _rounded(inner, dtype_of(value))
    if name in ("take", "strided_slice"):
        return _size(flow, call)
    return _computed(flow, call, name)


def _computed(flow: Dataflow, call: relax.Call, name: str) -> float | None:
    if name not in _UNARY and name not in _BINARY:
        return None
    operands = [uniform(flow, argument) for argument in call.args]
    if any(operand is None for operand in operands):
        return None
    with np.errstate(all="ignore"):
        return float((_UNARY.get(name) or _BINARY[name])(*map(np.float64, operands)))


def _rounded(value: float, dtype: str) -> float:
    if dtype == "bfloat16":
        return float(ml_dtypes.bfloat16(value))
    with np.errstate(all="ignore"):
        return float(np.asarray(value).astype(dtype)) if dtype in ("float16", "float32") else value


def _size(flow: Dataflow, call: relax.Call) -> float | None:
    """Return the number that is taken out of a tensor's shape, as ONNX does to find the head dimension."""
    sizes = _sizes(flow, call.args[0])
    index = uniform(flow, call.args[1]) if call.op.name == "relax.take" else None
    if sizes is None or index is None:
        return None
    size = sizes[int(index)]
    return float(size.value) if isinstance(size, tvm.tirx.IntImm) else None


def _sizes(flow: Dataflow, expr: relax.Expr) -> list[tvm.tirx.PrimExpr] | None:
    """Return the sizes that are the elements of a tensor."""
    tensor = flow.call(expr, "shape_to_tensor")
    if tensor is None:
        return None
    shape = flow.value(tensor.args[0])
    if isinstance(shape, relax.ShapeExpr):
        return list(shape.values)
    of = flow.call(shape, "shape_of")
    return shape_of(of.args[0]) if of is not None else None
