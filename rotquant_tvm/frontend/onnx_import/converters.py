"""The converter of an operator: ours, or for ONNX's own operators TVM's where we have none."""

from __future__ import annotations

import onnx

# Importing these modules registers their converters.
from rotquant_tvm.frontend.onnx_import import (  # noqa: F401
    arithmetic,
    attention,
    contrib,
    indexing,
    normalization,
    reductions,
    reshaping,
    rotary,
)
from rotquant_tvm.frontend.onnx_import.registry import (
    STANDARD,
    Converter,
    UnsupportedNode,
    find_converter,
    oldest_version,
)
from rotquant_tvm.frontend.onnx_import.upstream import upstream_converter


def converter_of(domain: str, op_type: str, opset: int) -> Converter:
    """Find the converter of an operator's version.

    An operator of another domain never falls to a standard one of its name. Raises UnsupportedNode if there is none.
    """
    if converter := find_converter(domain, op_type, opset):
        return converter
    if (oldest := oldest_version(domain, op_type)) is not None:
        raise UnsupportedNode(f"versions before {oldest} are not supported; export with a newer opset")
    if domain == STANDARD:
        if not onnx.defs.has(op_type):
            raise UnsupportedNode("it is not an operator of ONNX")
        if converter := upstream_converter(op_type, opset):
            return converter
    raise UnsupportedNode("there is no converter for it")
