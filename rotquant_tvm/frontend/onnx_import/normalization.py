"""Layer and RMS normalization."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.arithmetic import cast, dtype_of
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import sizes_of

_STASH_TYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}


def rms_norm(
    node: OnnxNode, x: relax.Expr, weight: relax.Expr | None, axis: int, epsilon: float, stash: str | None = "float32"
) -> relax.Expr:
    """X / sqrt(mean(x²) + epsilon) over the axes from ``axis`` on, times the weight.

    Computed in the element type ``stash`` (None: that of x) and rounded to that of x before the weight, as
    transformers spells it and passes know it.
    """
    dtype = dtype_of(x)
    wide = cast(node, x, stash or dtype)
    rank = len(sizes_of(x))
    axes = list(range(axis % rank - rank, 0))
    square = node.emit(R.power(wide, relax.const(2, dtype_of(wide))))
    mean = node.emit(R.add(node.emit(R.mean(square, axes, True)), relax.const(epsilon, dtype_of(wide))))
    result = cast(node, node.emit(R.multiply(wide, node.emit(R.rsqrt(mean)))), dtype)
    return result if weight is None else node.emit(R.multiply(weight, result))


@onnx_converter(STANDARD, "RMSNormalization", since=23)
def _rms_normalization(node: OnnxNode) -> relax.Expr:
    x, weight = node.input(0), node.input(1)
    stash = node.attribute("stash_type", 1)
    if stash not in _STASH_TYPES:
        raise UnsupportedNode(f"stash_type={stash} is not supported")
    if dtype_of(weight) != dtype_of(x):
        raise UnsupportedNode(f"a weight in {dtype_of(weight)} of an input in {dtype_of(x)} is not supported")
    axis, epsilon = node.attribute("axis", -1), node.attribute("epsilon", 1e-5)
    return rms_norm(node, x, weight, axis, epsilon, _STASH_TYPES[stash])


@onnx_converter(STANDARD, "LayerNormalization", since=17)
def _layer_normalization(node: OnnxNode) -> relax.Expr:
    x, weight, bias = (node.input(index) for index in range(3))
    return layer_norm(node, x, weight, bias, node.attribute("axis", -1))


def layer_norm(
    node: OnnxNode, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None, axis: int = -1
) -> relax.Expr:
    """(x - mean) / sqrt(variance + epsilon) over the axes from ``axis`` on, scaled and moved; sums in float32."""
    rank = len(sizes_of(x))
    axes = list(range(axis % rank - rank, 0))
    if bias is None:
        bias = relax.const(np.zeros([int(size) for size in sizes_of(weight)]), dtype_of(weight))
    return node.emit(R.nn.layer_norm(x, weight, bias, axes=axes, epsilon=node.attribute("epsilon", 1e-5)))
