"""com.microsoft.GroupQueryAttention: the attention of onnxruntime-genai's models.

The operator's documentation is in onnxruntime's docs/ContribOperators.md. Where that is silent (a window of w holds the
query itself; positions count from a sequence's own length), its CPU kernel was measured. A past that shares its memory
with the present has room for later tokens; here both are as long as what they hold, and the lengths that the graph
computes from its mask are those that a session counts by itself.
"""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.contrib_heads import attended, heads_first, presents
from rotquant_tvm.frontend.onnx_import.contrib_norm import rms_norm
from rotquant_tvm.frontend.onnx_import.contrib_rotary import angles_at, turned
from rotquant_tvm.frontend.onnx_import.node_checks import positive, refuse_attributes, refuse_inputs, refuse_outputs
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.token_counts import check_token_counts


@onnx_converter("com.microsoft", "GroupQueryAttention")
def _group_query_attention(node: OnnxNode) -> tuple[relax.Expr | None, ...]:
    _refuse(node)
    if node.value(5) is not None:
        check_token_counts(node.inputs[5], node.state)
    q, k, v = _queries_keys_values(node)
    q, k = _normalized(node, q, k)
    if node.attribute("do_rotary", 0):
        q, k = _rotated(node, q, k)
    k, v = presents(node, 3, k, v)
    size = int(node.attribute("local_window_size", -1))
    window = size if size > 0 else None
    return attended(node, [q, k, v], causal=True, window=window, bias=node.input(10)), k, v


def _refuse(node: OnnxNode) -> None:
    refuse_inputs(node, {11: "a sink in its softmax (head_sink)", 12: "a quantized cache (k_scale)"})
    refuse_inputs(node, {13: "a quantized cache (v_scale)"})
    refuse_outputs(node, {3: "the attention's scores (output_qk)"})
    refuse_attributes(
        node,
        {
            "smooth_softmax": (-1, 0),
            "kv_cache_bit_width": (0,),
            "k_quant_type": ("NONE", ""),
            "v_quant_type": ("NONE", ""),
            "sliding_window_cache": (0,),
            "causal": (1,),
            "qk_output": (0,),
        },
    )


def _queries_keys_values(node: OnnxNode) -> list[relax.Expr]:
    """The operands [batch, heads, seq, head_dim]; without keys the first input holds all three side by side."""
    heads, kv_heads = positive(node, "num_heads"), positive(node, "kv_num_heads")
    if heads % kv_heads:
        raise UnsupportedNode(f"{heads} heads cannot share {kv_heads} heads of keys and values")
    q, k, v = (node.input(i) for i in range(3))
    if (k is None) != (v is None) or q is None:
        raise UnsupportedNode("it has keys without values, or values without keys")
    if k is not None:
        return [heads_first(node, x, count) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads))]
    packed = heads_first(node, q, heads + 2 * kv_heads)
    parts = node.emit(R.split(packed, [heads, heads + kv_heads], axis=1))
    return [node.emit(relax.TupleGetItem(parts, i)) for i in range(3)]


def _normalized(node: OnnxNode, q: relax.Expr, k: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    """Queries and keys after the RMS norm of every head, where the node has its weights."""
    weights = node.input(14), node.input(15)
    if weights == (None, None):
        return q, k
    if None in weights:
        raise UnsupportedNode("it normalizes queries or keys alone")
    epsilon = float(node.attribute("qk_norm_epsilon", 1e-6))
    q, k = (rms_norm(node.emit, x, weight, epsilon) for x, weight in zip((q, k), weights, strict=True))
    return q, k


def _rotated(node: OnnxNode, q: relax.Expr, k: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    cos, sin = node.input(7), node.input(8)
    if cos is None or sin is None:
        raise UnsupportedNode("it rotates queries and keys and has no cos_cache or no sin_cache")
    positions = node.input(9) if node.input(9) is not None else node.state.position_ids()
    angles = angles_at(node, cos, sin, positions)
    interleaved = bool(node.attribute("rotary_interleaved", 0))
    q, k = (turned(node, x, angles, interleaved) for x in (q, k))
    return q, k
