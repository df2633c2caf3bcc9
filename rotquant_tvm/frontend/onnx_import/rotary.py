"""The standard operator RotaryEmbedding, and the layouts of heads."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import sizes_of
from rotquant_tvm.frontend.onnx_import.rotate_heads import RotaryAngles, rotate


def split_heads(node: OnnxNode, x: relax.Expr, heads: int) -> relax.Expr:
    """[batch, seq, heads * head_dim] → [batch, heads, seq, head_dim]."""
    batch, seq, width = sizes_of(x)
    if heads <= 0 or not isinstance(width, int) or width % heads:
        raise UnsupportedNode(f"{heads} heads do not fit a width of {width}")
    return swap_heads(node, node.emit(R.reshape(x, [batch, seq, heads, width // heads])))


def join_heads(node: OnnxNode, x: relax.Expr) -> relax.Expr:
    """[batch, seq, heads, head_dim] → [batch, seq, heads * head_dim]."""
    batch, seq, heads, head_dim = sizes_of(x)
    return node.emit(R.reshape(x, [batch, seq, heads * head_dim]))


def swap_heads(node: OnnxNode, x: relax.Expr) -> relax.Expr:
    """[batch, seq, heads, head_dim] ↔ [batch, heads, seq, head_dim]."""
    return node.emit(R.permute_dims(x, [0, 2, 1, 3]))


@onnx_converter(STANDARD, "RotaryEmbedding", since=23)
def _rotary_embedding(node: OnnxNode) -> relax.Expr:
    """X [batch, seq, width] or [batch, heads, seq, head_dim]; tables by position, or one row per token."""
    x, cos, sin, positions = (node.input(index) for index in range(4))
    flat = len(sizes_of(x)) == 3
    if flat and not node.attribute("num_heads"):
        raise UnsupportedNode("num_heads is needed for an input with three axes")
    x = split_heads(node, x, node.attributes["num_heads"]) if flat else x
    rotary_dim = node.attribute("rotary_embedding_dim", 0) or sizes_of(x)[-1]
    if positions is not None:
        cos, sin = (node.emit(R.take(table, positions, 0, mode="clip")) for table in (cos, sin))
    if any(len(sizes_of(table)) != 3 or sizes_of(table)[-1] * 2 != rotary_dim for table in (cos, sin)):
        raise UnsupportedNode(f"tables of shape {sizes_of(cos)} do not fit {rotary_dim} rotary dimensions")
    angles = RotaryAngles(*(node.emit(R.expand_dims(table, 1)) for table in (cos, sin)))
    y = rotate(node.emit, x, angles, bool(node.attribute("interleaved", 0)))
    return join_heads(node, swap_heads(node, y)) if flat else y
