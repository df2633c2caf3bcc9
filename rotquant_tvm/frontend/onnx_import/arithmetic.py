"""Operators on each element, and products of matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.tensors import dtype_name

_BINARY = {
    "Add": R.add,
    "Sub": R.subtract,
    "Mul": R.multiply,
    "Equal": R.equal,
    "Less": R.less,
    "LessOrEqual": R.less_equal,
    "Greater": R.greater,
    "GreaterOrEqual": R.greater_equal,
    "And": R.logical_and,
    "Or": R.logical_or,
    "Xor": R.logical_xor,
    "MatMul": R.matmul,
}
_UNARY = {
    "Neg": R.negative,
    "Abs": R.abs,
    "Sqrt": R.sqrt,
    "Exp": R.exp,
    "Log": R.log,
    "Sin": R.sin,
    "Cos": R.cos,
    "Tanh": R.tanh,
    "Sigmoid": R.sigmoid,
    "Erf": R.erf,
    "Floor": R.floor,
    "Ceil": R.ceil,
    "Sign": R.sign,
    "IsNaN": R.isnan,
    "Not": R.logical_not,
    "Relu": R.nn.relu,
}


def dtype_of(value: relax.Expr) -> str:
    """The element type of a tensor."""
    return str(value.ty.dtype.dtype)


def is_float(dtype: str) -> bool:
    """Whether an element type is one of floating point."""
    return dtype in ("float16", "bfloat16", "float32", "float64")


def cast(node: OnnxNode, value: relax.Expr, dtype: str) -> relax.Expr:
    """A value as another element type; itself if it has it already."""
    return value if dtype_of(value) == dtype else node.emit(R.astype(value, dtype))


def _binary(operator: Callable[..., relax.Expr]) -> Callable[[OnnxNode], relax.Expr]:
    return lambda node: operator(node.input(0), node.input(1))


def _unary(operator: Callable[..., relax.Expr]) -> Callable[[OnnxNode], relax.Expr]:
    return lambda node: operator(node.input(0))


for _name, _operator in _BINARY.items():
    onnx_converter(STANDARD, _name, since=7 if _name != "MatMul" else 1)(_binary(_operator))
for _name, _operator in _UNARY.items():
    onnx_converter(STANDARD, _name, since=6 if _name not in ("Erf", "Sign", "IsNaN", "Not") else 1)(_unary(_operator))


@onnx_converter(STANDARD, "Div", since=7)
def _divide(node: OnnxNode) -> relax.Expr:
    """Integers are divided towards zero."""
    a, b = node.inputs
    if is_float(dtype_of(a)):
        return R.divide(a, b)
    down = node.emit(R.floor_divide(a, b))
    exact = node.emit(R.equal(node.emit(R.multiply(down, b)), a))
    up = node.emit(R.logical_and(node.emit(R.less(down, _zero(down))), node.emit(R.logical_not(exact))))
    return R.add(down, node.emit(R.astype(up, dtype_of(a))))


def _zero(value: relax.Expr) -> relax.Expr:
    return relax.const(0, dtype_of(value))


@onnx_converter(STANDARD, "Mod", since=10)
def _modulo(node: OnnxNode) -> relax.Expr:
    """The remainder's sign is the divisor's, or with ``fmod`` the dividend's."""
    return (R.mod if node.attribute("fmod") else R.floor_mod)(*node.inputs)


@onnx_converter(STANDARD, "Pow", since=7)
def _power(node: OnnxNode) -> relax.Expr:
    base, exponent = node.inputs
    if not is_float(dtype_of(base)) and is_float(dtype_of(exponent)):
        raise UnsupportedNode("powers of integers with fractional exponents are not supported")
    return R.power(base, cast(node, exponent, dtype_of(base)))


def _folded(node: OnnxNode, operator: Callable[..., relax.Expr]) -> relax.Expr:
    return functools.reduce(lambda a, b: node.emit(operator(a, b)), node.inputs)


@onnx_converter(STANDARD, "Min", since=8)
def _minimum(node: OnnxNode) -> relax.Expr:
    return _folded(node, R.minimum)


@onnx_converter(STANDARD, "Max", since=8)
def _maximum(node: OnnxNode) -> relax.Expr:
    return _folded(node, R.maximum)


@onnx_converter(STANDARD, "Sum", since=8)
def _sum(node: OnnxNode) -> relax.Expr:
    return _folded(node, R.add)


@onnx_converter(STANDARD, "Reciprocal", since=6)
def _reciprocal(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    return R.divide(relax.const(1, dtype_of(x)), x)


@onnx_converter(STANDARD, "Clip", since=11)
def _clip(node: OnnxNode) -> relax.Expr:
    x, low, high = (node.input(index) for index in range(3))
    x = x if low is None else node.emit(R.maximum(x, low))
    return x if high is None else node.emit(R.minimum(x, high))


@onnx_converter(STANDARD, "Clip", since=6)
def _clip_by_attributes(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    for name, operator in (("min", R.maximum), ("max", R.minimum)):
        if name in node.attributes:
            x = node.emit(operator(x, relax.const(node.attributes[name], dtype_of(x))))
    return x


@onnx_converter(STANDARD, "Gelu", since=20)
def _gelu(node: OnnxNode) -> relax.Expr:
    approximate = node.attribute("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise UnsupportedNode(f"approximate={approximate!r} is not known")
    return (R.nn.gelu_tanh if approximate == "tanh" else R.nn.gelu)(node.input(0))


@onnx_converter(STANDARD, "Swish", since=24)
def _swish(node: OnnxNode) -> relax.Expr:
    x, alpha = node.input(0), node.attribute("alpha", 1.0)
    scaled = x if alpha == 1 else node.emit(R.multiply(x, relax.const(alpha, dtype_of(x))))
    return R.multiply(x, node.emit(R.sigmoid(scaled)))


@onnx_converter(STANDARD, "Where", since=9)
def _where(node: OnnxNode) -> relax.Expr:
    return R.where(*node.inputs)


@onnx_converter(STANDARD, "Identity")
def _identity(node: OnnxNode) -> Any:
    return node.values[0]


@onnx_converter(STANDARD, "Dropout", since=7)
def _dropout(node: OnnxNode) -> Any:
    """Nothing, outside of training."""
    training = node.known(2)
    if node.value(2) is not None and (training is None or bool(training.array)):
        raise UnsupportedNode("training_mode is on; export the model for inference")
    return node.values[0]


@onnx_converter(STANDARD, "Cast", since=6)
def _cast(node: OnnxNode) -> relax.Expr:
    return _convert(node, dtype_name(node.attributes["to"]))


@onnx_converter(STANDARD, "CastLike", since=15)
def _cast_like(node: OnnxNode) -> relax.Expr:
    return _convert(node, dtype_of(node.input(1)))


def _convert(node: OnnxNode, dtype: str) -> relax.Expr:
    x = node.input(0)
    if dtype == "bool" and dtype_of(x) != "bool":
        return R.not_equal(x, _zero(x))
    return cast(node, x, dtype)


@onnx_converter(STANDARD, "Gemm", since=7)
def _gemm(node: OnnxNode) -> relax.Expr:
    a, b, c = (node.input(index) for index in range(3))
    a = node.emit(R.permute_dims(a)) if node.attribute("transA") else a
    b = node.emit(R.permute_dims(b)) if node.attribute("transB") else b
    product = _scaled(node, node.emit(R.matmul(a, b)), node.attribute("alpha", 1.0))
    return product if c is None else R.add(product, _scaled(node, c, node.attribute("beta", 1.0)))


def _scaled(node: OnnxNode, x: relax.Expr, factor: float) -> relax.Expr:
    return x if factor == 1 else node.emit(R.multiply(x, relax.const(np.float64(factor), dtype_of(x))))


@onnx_converter(STANDARD, "Einsum", since=12)
def _einsum(node: OnnxNode) -> relax.Expr:
    return R.einsum(relax.Tuple(node.inputs), node.attributes["equation"].replace(" ", ""))
