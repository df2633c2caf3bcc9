"""Reductions, running sums and softmax."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.arithmetic import dtype_of
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import known_axes, known_integers, sizes_of

_REDUCTIONS = {"ReduceSum": R.sum, "ReduceMean": R.mean, "ReduceMax": R.max, "ReduceMin": R.min, "ReduceProd": R.prod}


def _reduce(operator: Callable[..., relax.Expr]) -> Callable[[OnnxNode], relax.Expr]:
    def convert(node: OnnxNode) -> relax.Expr:
        x, axes = node.input(0), known_axes(node)
        if not axes and node.attribute("noop_with_empty_axes"):
            return x
        return operator(x, axes or None, bool(node.attribute("keepdims", 1)))

    return convert


for _name, _operator in _REDUCTIONS.items():
    onnx_converter(STANDARD, _name)(_reduce(_operator))


@onnx_converter(STANDARD, "ReduceSumSquare")
def _sum_of_squares(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    return R.sum(node.emit(R.multiply(x, x)), known_axes(node) or None, bool(node.attribute("keepdims", 1)))


@onnx_converter(STANDARD, "CumSum", since=11)
def _running_sum(node: OnnxNode) -> relax.Expr:
    x = node.input(0)
    axis = known_integers(node, 1, "axis")[0] % len(sizes_of(x))
    exclusive, reverse = bool(node.attribute("exclusive", 0)), bool(node.attribute("reverse", 0))
    x = node.emit(R.flip(x, axis)) if reverse else x
    total = node.emit(R.cumsum(x, axis, dtype_of(x), exclusive))
    return R.flip(total, axis) if reverse else total


def _softmax(operator: Callable[..., relax.Expr]) -> Callable[[OnnxNode], relax.Expr]:
    def convert(node: OnnxNode) -> relax.Expr:
        """Before version 13 all axes from ``axis`` on were one, which is the same for the last."""
        x = node.input(0)
        rank, axis = len(sizes_of(x)), node.attribute("axis", -1 if node.opset >= 13 else 1)
        if node.opset < 13 and axis % rank != rank - 1:
            raise UnsupportedNode(f"its axis {axis} is not the last; export with opset 13 or newer")
        return operator(x, axis)

    return convert


onnx_converter(STANDARD, "Softmax")(_softmax(R.nn.softmax))
onnx_converter(STANDARD, "LogSoftmax")(_softmax(R.nn.log_softmax))


@onnx_converter(STANDARD, "TopK", since=10)
def _top_k(node: OnnxNode) -> tuple[relax.Expr, relax.Expr]:
    """The largest or smallest elements of an axis, sorted, which a node that asks for no order accepts too."""
    x, count = node.input(0), known_integers(node, 1, "count")[0]
    axis, largest = node.attribute("axis", -1), bool(node.attribute("largest", 1))
    both = node.emit(R.topk(x, count, axis, "both", largest, "int64"))
    return node.emit(relax.TupleGetItem(both, 0)), node.emit(relax.TupleGetItem(both, 1))
