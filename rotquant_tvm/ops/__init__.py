"""TensorIR definitions of the KV-cache operators, generic in the format."""

from .advance import advance
from .append import append
from .attention_decode import attention_decode
from .attention_dense import attention_dense
from .attention_prefill import attention_prefill
from .axes import Axes
from .dequantize import dequantize_cache
from .quantize import dequantize, quantize, roundtrip
from .rotate import rotate

__all__ = [
    "Axes",
    "advance",
    "append",
    "attention_decode",
    "attention_dense",
    "attention_prefill",
    "dequantize",
    "dequantize_cache",
    "quantize",
    "rotate",
    "roundtrip",
]
