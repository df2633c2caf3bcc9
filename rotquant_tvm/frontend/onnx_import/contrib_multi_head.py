"""com.microsoft.MultiHeadAttention: queries, keys and values from elsewhere, their biases added here."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.contrib_heads import attended, heads_first, presents
from rotquant_tvm.frontend.onnx_import.contrib_masks import added, mask_bias
from rotquant_tvm.frontend.onnx_import.node_checks import positive, refuse_inputs, refuse_outputs
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.rotary import swap_heads


@onnx_converter("com.microsoft", "MultiHeadAttention")
def _multi_head_attention(node: OnnxNode) -> tuple[relax.Expr | None, ...]:
    refuse_inputs(node, {8: "a cache of fixed size (past_sequence_length)", 9: "beams (cache_indirection)"})
    refuse_outputs(node, {3: "the attention's scores (qk)"})
    q, k, v = _with_bias(node, _queries_keys_values(node))
    k, v = presents(node, 6, k, v)
    bias = node.input(5)
    if node.input(4) is not None:
        sizes = (q.ty.shape[0], q.ty.shape[2], k.ty.shape[2])
        bias = added(node, bias, mask_bias(node, node.input(4), sizes, str(q.ty.dtype)))
    causal = bool(node.attribute("unidirectional", 0))
    return attended(node, [q, k, v], causal=causal, bias=bias), k, v


def _queries_keys_values(node: OnnxNode) -> list[relax.Expr]:
    """The operands [batch, heads, length, head_dim] from three inputs, from q and packed k and v, or from one."""
    heads = positive(node, "num_heads")
    q, k, v = (node.input(i) for i in range(3))
    if q is not None and q.ty.ndim == 5 and k is None and v is None:
        return _unpacked(node, q, 3)
    if k is not None and k.ty.ndim == 5 and v is None:
        return [heads_first(node, q, heads), *_unpacked(node, k, 2)]
    if k is not None and k.ty.ndim == 4:
        raise UnsupportedNode("it attends to keys and values computed before (cross-attention)")
    if q is None or k is None or v is None:
        raise UnsupportedNode("it lacks its keys or values")
    return [heads_first(node, x, heads) for x in (q, k, v)]


def _unpacked(node: OnnxNode, packed: relax.Expr, count: int) -> list[relax.Expr]:
    """The parts of [batch, length, heads, count, head_dim]."""
    if packed.ty.shape[3] != count:
        raise UnsupportedNode(f"a packed input has {packed.ty.shape[3]} parts where {count} are expected")
    parts = [node.emit(R.take(packed, relax.const(i, "int64"), axis=3, mode="clip")) for i in range(count)]
    return [swap_heads(node, part) for part in parts]


def _with_bias(node: OnnxNode, parts: list[relax.Expr]) -> list[relax.Expr]:
    """The operands with their slices of the bias [q + k + v widths] added."""
    bias = node.input(3)
    if bias is None:
        return parts
    shapes = [(int(part.ty.shape[1]), int(part.ty.shape[3])) for part in parts]
    begin, result = 0, []
    for part, (heads, head_dim) in zip(parts, shapes, strict=True):
        piece = node.emit(R.strided_slice(bias, axes=[0], begin=[begin], end=[begin + heads * head_dim]))
        result.append(node.emit(R.add(part, node.emit(R.reshape(piece, [1, heads, 1, head_dim])))))
        begin += heads * head_dim
    if begin != int(bias.ty.shape[0]):
        raise UnsupportedNode(f"its bias has {bias.ty.shape[0]} elements where {begin} are expected")
    return result
