"""Operators on tensors whose elements are known at import: the arithmetic of shapes, done with NumPy.

Elements may be expressions in the dynamic sizes (arrays of dtype object), so that a shape that a graph computes
(``Shape``, ``Gather``, ``Concat``, ``Where``, …) is known where ``Reshape``, ``Expand``, ``Slice`` or ``Range`` ask for
it. A function returns None where it cannot tell the result, and the node is then converted like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from rotquant_tvm.frontend.onnx_import.known_value import MAX_ELEMENTS, KnownValue, object_array, shape_of
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode
from rotquant_tvm.frontend.onnx_import.tensors import dtype_name

Array = np.ndarray[Any, Any]
Fold = Callable[[OnnxNode, list[Any]], Any]

_FOLDS: dict[str, Fold] = {}


def fold(node: OnnxNode) -> list[KnownValue] | None:
    """The values of a node's outputs if they are known, else None."""
    function = _FOLDS.get(node.op_type) if node.domain == STANDARD else None
    if function is None or not node.values:
        return None
    if node.op_type in ("Shape", "Size"):
        result = function(node, node.values)
    else:
        if not all(value is None or isinstance(value, KnownValue) for value in node.values):
            return None
        try:
            with np.errstate(all="ignore"):
                result = function(node, node.values)
        except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
            raise UnsupportedNode(f"its known operands do not fit: {error}") from error
    if result is None:
        return None
    return result if isinstance(result, list) else [result]


def folds(*op_types: str) -> Callable[[Fold], Fold]:
    """Register a function for operators."""

    def register(function: Fold) -> Fold:
        for op_type in op_types:
            _FOLDS[op_type] = function
        return function

    return register


def _made(node: OnnxNode, array: Array, dtype: str) -> KnownValue:
    """The result: every expression simplified."""
    if array.dtype == object:
        array = object_array([node.state.simplify(element) for element in array.ravel()]).reshape(array.shape)
    return KnownValue.of(array, dtype)


def _each(function: Callable[[Any, Any], Any], a: KnownValue, b: KnownValue) -> Array:
    """A function of two elements, over broadcast arrays; NumPy's own would look into expressions."""
    left, right = np.broadcast_arrays(a.objects(), b.objects())
    pairs = zip(left.ravel(), right.ravel(), strict=True)
    return object_array([function(x, y) for x, y in pairs]).reshape(left.shape)


def _sizes(value: Any) -> list[Any] | None:
    """The sizes of an operand that is known, or whose shape is."""
    return list(value.array.shape) if isinstance(value, KnownValue) else shape_of(value)


@folds("Shape")
def _shape(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    sizes = _sizes(values[0])
    if sizes is None:
        return None
    start, end = node.attribute("start", 0), node.attribute("end", len(sizes))
    return _made(node, object_array(sizes[slice(*(_clamped(bound, len(sizes)) for bound in (start, end)))]), "int64")


@folds("Size")
def _size(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    sizes = _sizes(values[0])
    if sizes is None:
        return None
    product: Any = 1
    for size in sizes:
        product = product * size
    return _made(node, object_array([product]).reshape(()), "int64")


def _clamped(bound: int, size: int) -> int:
    return min(max(bound + size if bound < 0 else bound, 0), size)


def _floor_or_trunc(a: Any, b: Any) -> Any:
    """Integer division as ONNX has it: towards zero."""
    if isinstance(a, tvm.ir.Expr) or isinstance(b, tvm.ir.Expr):
        return tirx.truncdiv(*(each if isinstance(each, tvm.ir.Expr) else tirx.const(each, "int64") for each in (a, b)))
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(a: Any, b: Any) -> Any:
    if isinstance(a, tvm.ir.Expr) or isinstance(b, tvm.ir.Expr):
        return tirx.floormod(*(each if isinstance(each, tvm.ir.Expr) else tirx.const(each, "int64") for each in (a, b)))
    return a % b


def _extreme(numbers: Any, expressions: Any) -> Callable[[Any, Any], Any]:
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, tvm.ir.Expr) or isinstance(b, tvm.ir.Expr):
            sizes = (each if isinstance(each, tvm.ir.Expr) else tirx.const(each, "int64") for each in (a, b))
            return expressions(*sizes)
        return numbers(a, b)

    return choose


_SIZE_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _floor_or_trunc,
    "Mod": _remainder,
    "Min": _extreme(min, tirx.min),
    "Max": _extreme(max, tirx.max),
}
_NUMBER_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Mod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "Pow": np.power,
}


@folds("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Pow")
def _arithmetic(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    result: KnownValue | None = values[0]
    for other in values[1:]:
        result = None if result is None else _binary(node, result, other)
    return result


def _binary(node: OnnxNode, a: KnownValue, b: KnownValue) -> KnownValue | None:
    if _too_large(np.broadcast_shapes(a.array.shape, b.array.shape)):
        return None
    numbers = a.is_number and b.is_number
    integers = a.array.dtype.kind in "iuO"
    if numbers and not (integers and node.op_type in ("Div", "Mod")):
        return KnownValue.of(_NUMBER_ARITHMETIC[node.op_type](a.array, b.array), a.dtype)
    if node.op_type not in _SIZE_ARITHMETIC or node.attribute("fmod"):
        return None
    if node.op_type in ("Div", "Mod") and not all(_not_zero(node, e) for e in b.elements()):
        return None
    return _made(node, _each(_SIZE_ARITHMETIC[node.op_type], a, b), a.dtype)


def _not_zero(node: OnnxNode, element: Any) -> bool:
    return (
        node.state.proved(tirx.NE(element, tirx.const(0, "int64")))
        if isinstance(element, tvm.ir.Expr)
        else element != 0
    )


_UNARY: dict[str, Callable[[Array], Any]] = {
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Log": np.log,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Abs": np.abs,
    "Reciprocal": np.reciprocal,
    "Not": np.logical_not,
    "Sign": np.sign,
    "IsNaN": np.isnan,
}


@folds(*_UNARY)
def _unary(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    if not values[0].is_number:
        return None
    result = np.asarray(_UNARY[node.op_type](values[0].array))
    return KnownValue.of(result, "bool" if node.op_type in ("Not", "IsNaN") else values[0].dtype)


@folds("Neg")
def _negate(node: OnnxNode, values: list[Any]) -> KnownValue:
    if values[0].is_number:
        return KnownValue.of(np.asarray(-values[0].array), values[0].dtype)
    return _made(
        node, object_array([-each for each in values[0].elements()]).reshape(values[0].array.shape), values[0].dtype
    )


@folds("Identity")
def _identity(node: OnnxNode, values: list[KnownValue]) -> KnownValue:
    return values[0]


@folds("Cast")
def _cast(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    return _as_type(values[0], dtype_name(node.attributes["to"]))


@folds("CastLike")
def _cast_like(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    return _as_type(values[0], values[1].dtype)


def _as_type(value: KnownValue, dtype: str) -> KnownValue | None:
    if value.is_number:
        return KnownValue.of(value.array.astype(dtype), dtype)
    return KnownValue.of(value.array, dtype) if dtype in ("int64", "int32") else None


_COMPARISONS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "Equal": (np.equal, tirx.EQ),
    "Less": (np.less, tirx.LT),
    "LessOrEqual": (np.less_equal, tirx.LE),
    "Greater": (np.greater, tirx.GT),
    "GreaterOrEqual": (np.greater_equal, tirx.GE),
}


@folds(*_COMPARISONS)
def _compare(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    """A comparison of sizes is known if it always or never holds."""
    a, b = values
    if _too_large(np.broadcast_shapes(a.array.shape, b.array.shape)):
        return None
    numbers, expressions = _COMPARISONS[node.op_type]
    if a.is_number and b.is_number:
        return KnownValue.of(np.asarray(numbers(a.array, b.array)), "bool")

    def compare(x: Any, y: Any) -> bool | None:
        difference = node.state.simplify(x - y)
        if isinstance(difference, int):
            return bool(numbers(difference, 0))
        holds = expressions(difference, tirx.const(0, "int64"))
        return True if node.state.proved(holds) else False if node.state.proved(tirx.Not(holds)) else None

    found = _each(compare, a, b)
    return None if any(each is None for each in found.ravel()) else KnownValue.of(found.astype(bool), "bool")


@folds("And", "Or", "Xor")
def _logic(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    if _too_large(np.broadcast_shapes(values[0].array.shape, values[1].array.shape)):
        return None
    apply = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}[node.op_type]
    return KnownValue.of(np.asarray(apply(values[0].array, values[1].array)), "bool")


@folds("Where")
def _where(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    condition, a, b = values
    if _too_large(np.broadcast_shapes(condition.array.shape, a.array.shape, b.array.shape)):
        return None
    if a.is_number and b.is_number:
        return KnownValue.of(np.where(condition.array, a.array, b.array), a.dtype)
    return _made(node, np.where(condition.array, a.objects(), b.objects()), a.dtype)


_REDUCTIONS = {"ReduceProd": _SIZE_ARITHMETIC["Mul"], "ReduceSum": _SIZE_ARITHMETIC["Add"]}
_REDUCTIONS |= {"ReduceMax": _SIZE_ARITHMETIC["Max"], "ReduceMin": _SIZE_ARITHMETIC["Min"]}


@folds(*_REDUCTIONS)
def _reduce(node: OnnxNode, values: list[Any]) -> KnownValue | None:
    """Reductions of integers over all axes; others are left to the model."""
    value = values[0]
    axes = values[1].elements() if len(values) > 1 and values[1] is not None else node.attribute("axes", ())
    whole = {int(axis) % max(value.array.ndim, 1) for axis in axes} == set(range(value.array.ndim))
    if value.dtype not in ("int64", "int32") or not value.array.size:
        return None
    if not whole and (axes or node.attribute("noop_with_empty_axes")):
        return None
    first, *others = value.elements()
    for each in others:
        first = _REDUCTIONS[node.op_type](first, each)
    shape = [1] * value.array.ndim if node.attribute("keepdims", 1) else []
    return _made(node, object_array([first]).reshape(shape), value.dtype)


def _too_large(shape: Any) -> bool:
    return math.prod(int(size) for size in shape) > MAX_ELEMENTS
