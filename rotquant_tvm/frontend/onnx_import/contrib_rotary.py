"""com.microsoft.RotaryEmbedding, and the angles that attentions look up by themselves."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.contrib_heads import heads_first
from rotquant_tvm.frontend.onnx_import.node_checks import refuse_attributes, required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import sizes_of
from rotquant_tvm.frontend.onnx_import.rotary import join_heads, swap_heads
from rotquant_tvm.frontend.onnx_import.rotate_heads import RotaryAngles, rotate


def angles_at(node: OnnxNode, cos: relax.Expr, sin: relax.Expr, positions: relax.Expr) -> RotaryAngles:
    """The rows of two tables [positions, dim / 2] at positions [batch, seq]; looked up once for all layers.

    Raises UnsupportedNode if the tables are not of one shape.
    """
    if len(sizes_of(cos)) != 2 or sizes_of(cos) != sizes_of(sin) or not isinstance(sizes_of(cos)[1], int):
        raise UnsupportedNode(f"its cosines {sizes_of(cos)} and sines {sizes_of(sin)} are no tables of one shape")
    key = ("angles", cos, sin, positions)
    if key not in node.state.shared:
        rows = [node.emit(R.take(table, positions, axis=0, mode="clip")) for table in (cos, sin)]
        node.state.shared[key] = RotaryAngles(*(node.emit(R.expand_dims(row, 1)) for row in rows))
    angles: RotaryAngles = node.state.shared[key]
    return angles


def turned(node: OnnxNode, x: relax.Expr, angles: RotaryAngles, interleaved: bool) -> relax.Expr:
    """Turn x [batch, heads, seq, head_dim]. Raises UnsupportedNode if its heads are smaller than the angles' tables."""
    if angles.dim > sizes_of(x)[3] or (interleaved and angles.dim % 2):
        raise UnsupportedNode(f"its tables are for {angles.dim} dimensions and its heads have {sizes_of(x)[3]}")
    return rotate(node.emit, x, angles, interleaved)


@onnx_converter("com.microsoft", "RotaryEmbedding")
def _rotary_embedding(node: OnnxNode) -> relax.Expr:
    """Rotate [batch, seq, heads * head_dim] or [batch, heads, seq, head_dim]."""
    refuse_attributes(node, {"is_packed_batching": (0,), "scale": (1.0, 0.0)})
    x, positions, cos, sin = (required(node, i) for i in range(4))
    flat = len(sizes_of(x)) == 3
    heads = heads_first(node, x, _heads(node, x, cos)) if flat else x
    if len(sizes_of(positions)) == 1:
        positions = _counted(node, positions, *sizes_of(heads)[::2])
    angles = angles_at(node, cos, sin, positions)
    result = turned(node, heads, angles, bool(node.attribute("interleaved", 0)))
    return join_heads(node, swap_heads(node, result)) if flat else result


def _heads(node: OnnxNode, x: relax.Expr, cos: relax.Expr) -> int:
    """How many heads the last axis holds: ``num_heads``, or as many as the angles are for."""
    if node.attribute("num_heads", 0):
        return int(node.attribute("num_heads"))
    if node.attribute("rotary_embedding_dim", 0):
        raise UnsupportedNode("it has rotary_embedding_dim without num_heads")
    return int(max(1, sizes_of(x)[2] // (2 * sizes_of(cos)[1])))


def _counted(node: OnnxNode, offset: relax.Expr, batch: Any, seq: Any) -> relax.Var:
    """Positions int64 [batch, seq] that count up from ``offset`` [1]."""
    key = ("positions", offset, str(batch), str(seq))
    if key not in node.state.shared:
        steps = node.emit(R.arange(0, seq, 1, "int64"))
        first = node.emit(R.astype(offset, "int64"))
        counted = node.emit(R.add(steps, first))
        node.state.shared[key] = node.emit(R.broadcast_to(counted, [batch, seq]))
    return node.state.shared[key]
