"""com.microsoft.FusedMatMul: a product with transpositions and a factor."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.node_checks import required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, onnx_converter


@onnx_converter("com.microsoft", "FusedMatMul")
def _fused_matmul(node: OnnxNode) -> relax.Expr:
    operands = [_transposed(node, required(node, i), side) for i, side in enumerate("AB")]
    product = R.matmul(*operands)
    alpha = float(node.attribute("alpha", 1.0))
    if alpha == 1.0:
        return product
    product = node.emit(product)
    return R.multiply(product, relax.const(np.float32(alpha), str(product.ty.dtype)))


def _transposed(node: OnnxNode, x: relax.Expr, side: str) -> relax.Expr:
    """An operand as a product takes it: ``transBatch`` has the rows first, ``trans`` rows and columns exchanged."""
    axes = list(range(x.ty.ndim))
    if len(axes) > 1 and node.attribute(f"transBatch{side}", 0):
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if len(axes) > 1 and node.attribute(f"trans{side}", 0):
        axes = [*axes[:-2], axes[-1], axes[-2]]
    return x if axes == sorted(axes) else node.emit(R.permute_dims(x, axes))
