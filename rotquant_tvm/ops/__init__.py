"""TensorIR definitions of the KV-cache operators, generic in the format."""

from .advance import advance
from .append import append
from .append_plain import append_plain
from .attention_decode import attention_decode
from .attention_dense import attention_dense
from .attention_prefill import attention_prefill
from .axes import Axes
from .dequantize import dequantize_cache
from .dequantize_segments import dequantize_segments
from .encode_tiles import encode_tiles
from .flush import flush
from .join import join
from .plan_flush import plan_flush
from .quantize import dequantize, quantize, roundtrip
from .rotate import rotate
from .score import query_features, score
from .split_centre import split_centre

__all__ = [
    "Axes",
    "advance",
    "append",
    "append_plain",
    "attention_decode",
    "attention_dense",
    "attention_prefill",
    "dequantize",
    "dequantize_cache",
    "dequantize_segments",
    "encode_tiles",
    "flush",
    "join",
    "plan_flush",
    "quantize",
    "query_features",
    "rotate",
    "roundtrip",
    "score",
    "split_centre",
]
