"""Operators that are refused, with what to do instead."""

from __future__ import annotations

from typing import NoReturn

from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter

_FIXED_STEP = "it is made for one decoding loop of onnxruntime; export the model with MultiHeadAttention"
_EXPORT = "export the model with GroupQueryAttention or MultiHeadAttention"
_EXPERTS = "export the experts as ordinary products"
_LOOP = "what it computes depends on data; export one step of the decoder without loops"

REFUSED = {
    ("", "Loop"): _LOOP,
    ("", "Scan"): _LOOP,
    ("com.microsoft", "BeamSearch"): "it holds a whole generation; compile the decoder in its subgraph",
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): _FIXED_STEP,
    ("com.microsoft", "DecoderMaskedSelfAttention"): _FIXED_STEP,
    ("com.microsoft", "EmbedLayerNormalization"): "it belongs to encoders (BERT), and this compiler takes decoders",
    ("com.microsoft", "GreedySearch"): "it holds a whole generation; compile the decoder in its subgraph",
    ("com.microsoft", "LongformerAttention"): _EXPORT,
    ("com.microsoft", "MoE"): _EXPERTS,
    ("com.microsoft", "PackedAttention"): _EXPORT,
    ("com.microsoft", "PackedMultiHeadAttention"): _EXPORT,
    ("com.microsoft", "PagedAttention"): _EXPORT,
    ("com.microsoft", "QAttention"): "quantize the model's weights with MatMulNBits instead",
    ("com.microsoft", "QMoE"): _EXPERTS,
    ("com.microsoft", "SparseAttention"): _EXPORT,
}
"""Domain and operator, and the remedy."""


def _refuse(node: OnnxNode) -> NoReturn:
    raise UnsupportedNode(REFUSED[node.domain, node.op_type])


for _domain, _operator in REFUSED:
    onnx_converter(_domain, _operator)(_refuse)
