"""The operators of onnxruntime's domain com.microsoft; importing this registers their converters."""

from __future__ import annotations

from rotquant_tvm.frontend.onnx_import import (  # noqa: F401
    contrib_activation,
    contrib_attention,
    contrib_gqa,
    contrib_matmul,
    contrib_multi_head,
    contrib_norm,
    contrib_quantized,
    contrib_refused,
    contrib_rotary,
    if_branches,
)
