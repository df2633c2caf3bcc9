"""A node's attributes as Python and NumPy values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx import AttributeProto

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.onnx_import.registry import UnsupportedNode

if TYPE_CHECKING:
    import onnx

    from rotquant_tvm.frontend.onnx_import.model_file import OnnxFile


def read_attributes(node: onnx.NodeProto, file: OnnxFile) -> dict[str, Any]:
    """Attributes by name: numbers, strings, tuples of these, arrays for tensors, GraphProto for graphs."""
    return {attribute.name: _value(attribute, file) for attribute in node.attribute}


def _value(attribute: onnx.AttributeProto, file: OnnxFile) -> Any:
    kind = attribute.type
    if attribute.ref_attr_name:
        raise UnsupportedNode(f"its attribute {attribute.name!r} refers to an attribute of a function")
    if kind == AttributeProto.FLOAT:
        return float(attribute.f)
    if kind == AttributeProto.INT:
        return int(attribute.i)
    if kind == AttributeProto.STRING:
        return _text(attribute.s)
    if kind == AttributeProto.TENSOR:
        try:
            return file.array(attribute.t)
        except ModelError as error:
            raise UnsupportedNode(str(error)) from error
    if kind == AttributeProto.GRAPH:
        return attribute.g
    if kind in (AttributeProto.FLOATS, AttributeProto.INTS):
        return tuple(attribute.floats if kind == AttributeProto.FLOATS else attribute.ints)
    if kind == AttributeProto.STRINGS:
        return tuple(_text(text) for text in attribute.strings)
    raise UnsupportedNode(f"its attribute {attribute.name!r} is of a kind that cannot be imported ({kind})")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
