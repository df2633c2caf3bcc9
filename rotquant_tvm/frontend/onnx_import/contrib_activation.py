"""The activations of com.microsoft."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.node_checks import required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, onnx_converter


@onnx_converter("com.microsoft", "Gelu")
def _gelu(node: OnnxNode) -> relax.Expr:
    return R.nn.gelu(required(node, 0))


@onnx_converter("com.microsoft", "BiasGelu")
def _bias_gelu(node: OnnxNode) -> relax.Expr:
    return R.nn.gelu(node.emit(R.add(required(node, 0), required(node, 1))))


@onnx_converter("com.microsoft", "FastGelu")
def _fast_gelu(node: OnnxNode) -> relax.Expr:
    x, bias = required(node, 0), node.input(1)
    return R.nn.gelu_tanh(x if bias is None else node.emit(R.add(x, bias)))


@onnx_converter("com.microsoft", "QuickGelu")
def _quick_gelu(node: OnnxNode) -> relax.Expr:
    """Return x · sigmoid(alpha · x)."""
    x = required(node, 0)
    alpha = relax.const(np.float32(node.attribute("alpha", 1.702)), str(x.ty.dtype))
    return R.multiply(x, node.emit(R.sigmoid(node.emit(R.multiply(x, alpha)))))
