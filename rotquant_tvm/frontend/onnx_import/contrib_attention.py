"""com.microsoft.Attention: the projection to queries, keys and values, and attention, as of BERT and GPT-2."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.contrib_heads import attended, grown, heads_first
from rotquant_tvm.frontend.onnx_import.contrib_masks import added, mask_bias
from rotquant_tvm.frontend.onnx_import.node_checks import positive, refuse_attributes, refuse_inputs, required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter


@onnx_converter("com.microsoft", "Attention")
def _attention(node: OnnxNode) -> tuple[relax.Expr | None, ...]:
    refuse_inputs(node, {6: "a cache of fixed size (past_sequence_length)"})
    # onnxruntime has no kernel on CPUs that rotates here, so the meaning of do_rotary cannot be verified.
    refuse_attributes(node, {"do_rotary": (0,), "past_present_share_buffer": (0,)})
    heads = positive(node, "num_heads")
    q, k, v = (heads_first(node, part, heads) for part in _projected(node))
    past = node.input(4)
    if past is not None:
        halves = [node.emit(R.take(past, relax.const(i, "int64"), axis=0, mode="clip")) for i in (0, 1)]
        k, v = (grown(node, half, new) for half, new in zip(halves, (k, v), strict=True))
    bias = node.input(5)
    if node.input(3) is not None:
        sizes = (q.ty.shape[0], q.ty.shape[2], k.ty.shape[2])
        bias = added(node, bias, mask_bias(node, node.input(3), sizes, str(q.ty.dtype)))
    out = attended(node, [q, k, v], causal=bool(node.attribute("unidirectional", 0)), bias=bias)
    return out, node.emit(R.stack([k, v], axis=0)) if node.wants(1) else None


def _projected(node: OnnxNode) -> list[relax.Expr]:
    """Queries, keys and values [batch, seq, width] of the input; the weights [input, widths] hold all side by side."""
    x, weights, bias = required(node, 0), required(node, 1), node.input(2)
    product = node.emit(R.matmul(x, weights))
    product = product if bias is None else node.emit(R.add(product, bias))
    width = int(weights.ty.shape[1])
    sizes = [int(size) for size in node.attribute("qkv_hidden_sizes", ())] or [width // 3] * 3
    if len(sizes) != 3 or sum(sizes) != width or min(sizes) < 1:
        raise UnsupportedNode(f"its weights are {width} wide, and its queries, keys and values are {sizes}")
    parts = node.emit(R.split(product, [sizes[0], sizes[0] + sizes[1]], axis=2))
    return [node.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
