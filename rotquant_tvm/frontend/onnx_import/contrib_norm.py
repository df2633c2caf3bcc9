"""Layer norms with and without a mean, and those that add a residual first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.node_checks import refuse_outputs, required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter

Emit = Callable[[relax.Expr], relax.Var]
STATISTICS = {1: "the norm's mean or deviation", 2: "the norm's deviation"}


def rms_norm(emit: Emit, x: relax.Expr, weight: relax.Expr, epsilon: float) -> relax.Var:
    """Return x / rms(x) · weight over the last axis, computed in float32, in the dtype of ``x``.

    Rounded before the weight is multiplied, as transformers' models do; later passes recognize that form.
    """
    dtype = str(x.ty.dtype)
    wide = x if dtype == "float32" else emit(R.astype(x, "float32"))
    mean = emit(R.mean(emit(R.multiply(wide, wide)), axis=[-1], keepdims=True))
    inverse = emit(R.rsqrt(emit(R.add(mean, relax.const(np.float32(epsilon), "float32")))))
    normed = emit(R.multiply(wide, inverse))
    normed = normed if dtype == "float32" else emit(R.astype(normed, dtype))
    return emit(R.multiply(normed, weight))


def layer_norm(
    emit: Emit, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None, epsilon: float
) -> relax.Var:
    """Return (x − mean) / deviation · weight + bias over the last axis."""
    if bias is None:
        bias = relax.const(np.zeros([int(x.ty.shape[-1])], np.float32), "float32")
        bias = bias if str(x.ty.dtype) == "float32" else emit(R.astype(bias, x.ty.dtype))
    return emit(R.nn.layer_norm(x, weight, bias, axes=[-1], epsilon=epsilon))


def _simplified(node: OnnxNode) -> relax.Expr:
    refuse_outputs(node, {1: STATISTICS[2]})
    x, weight = required(node, 0), required(node, 1)
    axis = int(node.attribute("axis", -1))
    if axis not in (-1, x.ty.ndim - 1):
        raise UnsupportedNode(f"it normalizes from axis {axis} on; only the last axis is supported")
    return rms_norm(node.emit, x, weight, float(node.attribute("epsilon", 1e-5)))


# The operator belongs to onnxruntime, and its files have it in ONNX's own domain as well.
onnx_converter("", "SimplifiedLayerNormalization")(_simplified)
onnx_converter("com.microsoft", "SimplifiedLayerNormalization")(_simplified)


def _residual(node: OnnxNode, bias: int) -> relax.Expr:
    """Input, skip connection and the optional bias added."""
    x, skip = required(node, 0), required(node, 1)
    total = node.emit(R.add(x, skip))
    return total if node.input(bias) is None else node.emit(R.add(total, node.input(bias)))


@onnx_converter("com.microsoft", "SkipSimplifiedLayerNormalization")
def _skip_simplified(node: OnnxNode) -> tuple[relax.Expr | None, ...]:
    refuse_outputs(node, STATISTICS)
    total = _residual(node, 3)
    normed = rms_norm(node.emit, total, required(node, 2), float(node.attribute("epsilon", 1e-12)))
    return normed, None, None, total


@onnx_converter("com.microsoft", "SkipLayerNormalization")
def _skip_layer(node: OnnxNode) -> tuple[relax.Expr | None, ...]:
    refuse_outputs(node, STATISTICS)
    total = _residual(node, 4)
    epsilon = float(node.attribute("epsilon", 1e-12))
    return layer_norm(node.emit, total, required(node, 2), node.input(3), epsilon), None, None, total
