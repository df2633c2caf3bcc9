"""The masks of com.microsoft's attentions as numbers that are added to the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode


def mask_bias(node: OnnxNode, mask: relax.Expr, sizes: tuple[Any, Any, Any], dtype: str) -> relax.Var:
    """What a mask adds to the scores, [batch, 1, seq, total] in ``dtype``: 0, or the node's mask_filter_value.

    ``sizes`` are batch, seq and total. ``mask`` is 0 or 1 per key [batch, total] or per query and key
    [batch, seq, total]; or the number of keys of each sequence [batch]; or the keys' ends and then their
    beginnings [2 * batch].
    """
    batch, seq, total = sizes
    if mask.ty.ndim == 1:
        visible = _between(node, mask, batch, total)
    elif mask.ty.ndim in (2, 3):
        visible = node.emit(R.not_equal(mask, relax.const(0, str(mask.ty.dtype))))
        visible = node.emit(R.expand_dims(visible, [1, 2] if mask.ty.ndim == 2 else [1]))
    else:
        raise UnsupportedNode(f"its mask has {mask.ty.ndim} axes; only 1, 2 and 3 are supported")
    hidden = float(node.attribute("mask_filter_value", -10000.0))
    zero, hidden = (relax.const(np.float32(number), dtype) for number in (0.0, hidden))
    bias = node.emit(R.where(visible, zero, hidden))
    return node.emit(R.broadcast_to(bias, [batch, 1, seq, total]))


def _between(node: OnnxNode, limits: relax.Expr, batch: Any, total: Any) -> relax.Var:
    """Which keys lie between the limits of their sequence, [batch, 1, 1, total]."""
    count = limits.ty.shape[0]
    columns = node.emit(R.arange(0, total, 1, str(limits.ty.dtype)))
    if node.state.equal(count, batch):
        return node.emit(R.less(columns, node.emit(R.reshape(limits, [batch, 1, 1, 1]))))
    if node.state.equal(count, 2 * batch):
        halves = node.emit(R.reshape(limits, [2, batch, 1, 1, 1]))
        end, begin = (node.emit(R.take(halves, relax.const(i, "int64"), axis=0, mode="clip")) for i in (0, 1))
        above = node.emit(R.greater_equal(columns, begin))
        return node.emit(R.logical_and(node.emit(R.less(columns, end)), above))
    raise UnsupportedNode(
        f"its mask has one axis of size {count}; only the batch or twice the batch ({batch}) is supported"
    )


def added(node: OnnxNode, bias: relax.Expr | None, other: relax.Expr | None) -> relax.Expr | None:
    """The sum of two biases, either of which may be absent."""
    if bias is None or other is None:
        return other if bias is None else bias
    return node.emit(R.add(bias, other))
