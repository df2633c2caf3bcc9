"""What the attentions of com.microsoft share: operands [batch, heads, length, head_dim] and a growing cache."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.attention import Masking, attend
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode
from rotquant_tvm.frontend.onnx_import.reshaping import sizes_of
from rotquant_tvm.frontend.onnx_import.rotary import join_heads, split_heads, swap_heads


def heads_first(node: OnnxNode, x: relax.Expr, heads: int) -> relax.Expr:
    """[batch, seq, heads * head_dim] → [batch, heads, seq, head_dim]."""
    if len(sizes_of(x)) != 3:
        raise UnsupportedNode(f"an input has {len(sizes_of(x))} axes where [batch, seq, width] is expected")
    return split_heads(node, x, heads)


def grown(node: OnnxNode, past: relax.Expr | None, new: relax.Expr) -> relax.Expr:
    """The present from the past, if there is one, and the new tokens."""
    return new if past is None else node.emit(R.concat([past, new], axis=2))


def presents(node: OnnxNode, first: int, k: relax.Expr, v: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    """Keys and values after those of the pasts, which are input ``first`` and the one after it, or absent."""
    past_k, past_v = node.input(first), node.input(first + 1)
    if (past_k is None) != (past_v is None):
        raise UnsupportedNode("it has past keys without values, or past values without keys")
    return grown(node, past_k, k), grown(node, past_v, v)


def attended(
    node: OnnxNode,
    operands: list[relax.Expr],
    *,
    causal: bool,
    window: int | None = None,
    bias: relax.Expr | None = None,
) -> relax.Expr:
    """The attention of the node's queries over its keys and values, [batch, seq, heads * head_dim].

    The last query is aligned with the last key; scale and soft-capping are the node's attributes, a scale of 0
    being the default, as onnxruntime reads it.
    """
    q, k, _ = operands
    offset: Any = node.state.simplify(sizes_of(k)[2] - sizes_of(q)[2])
    scale = float(node.attribute("scale", 0.0)) or None
    cap = float(node.attribute("softcap", 0.0))
    q, k, v = (swap_heads(node, x) for x in operands)
    return join_heads(node, attend(node, q, k, v, scale, Masking(causal, offset, window, bias), cap))
