"""What a node was converted to, compared with what ONNX's own type inference says of it."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TypeProto
from tvm import relax

from rotquant_tvm.frontend.onnx_import.known_value import KnownValue, shape_of
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode
from rotquant_tvm.frontend.onnx_import.tensors import DTYPES

_ELEMENTS = {name: element for element, name in DTYPES.items()}
_MAX_DATA = 64
"""Known operands up to this many elements are shown to the inference, which reads shapes and axes from them."""


def check_results(node: OnnxNode, proto: onnx.NodeProto, results: list[Any]) -> None:
    """Compare dtype, rank and fixed sizes of a standard operator's results with its schema.

    Raises UnsupportedNode if they differ: the converter, ours or TVM's, has misread the node.
    """
    if node.domain != STANDARD or proto.op_type in ("If", "Loop", "Scan", "Constant"):
        return
    expected = _infer(node, proto)
    for name, result in zip(node.outputs, results, strict=False):
        if name not in expected or result is None or not expected[name].HasField("tensor_type"):
            continue
        wanted = expected[name].tensor_type
        dtype, shape = _type(result)
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in wanted.shape.dim]
        same = dtype == DTYPES.get(wanted.elem_type, dtype)
        if wanted.HasField("shape"):
            same = same and len(shape) == len(sizes)
            pairs = zip(shape, sizes, strict=False)
            same = same and all(
                ours == theirs for ours, theirs in pairs if isinstance(ours, int) and theirs is not None
            )
        if not same:
            raise UnsupportedNode(
                f"it was read as {dtype} {shape} where ONNX gives {DTYPES.get(wanted.elem_type)} {sizes}"
            )


def _infer(node: OnnxNode, proto: onnx.NodeProto) -> dict[str, TypeProto]:
    """ONNX's types of a node's outputs; empty where it cannot tell."""
    try:
        schema = onnx.defs.get_schema(node.op_type, node.opset, "")
        types, data = {}, {}
        for name, value in zip(proto.input, node.values, strict=True):
            if value is None:
                continue
            types[name] = _type_proto(value)
            if node.state.is_constant(value):
                array = node.state.constant_value(value)
                if array.size <= _MAX_DATA and array.dtype.kind in "iu":
                    data[name] = onnx.numpy_helper.from_array(array, name)
        imports = [onnx.helper.make_opsetid("", node.opset)]
        return dict(onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports))
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise UnsupportedNode(f"ONNX refuses it: {str(error).splitlines()[0]}") from error
    except (onnx.defs.SchemaError, RuntimeError):
        return {}


def _type(value: relax.Expr | KnownValue) -> tuple[str, list[Any]]:
    if isinstance(value, KnownValue):
        return value.dtype, list(value.array.shape)
    return value.ty.dtype.dtype, shape_of(value) or []


def _type_proto(value: relax.Expr | KnownValue) -> TypeProto:
    dtype, shape = _type(value)
    sizes = [size if isinstance(size, int) else None for size in shape]
    return onnx.helper.make_tensor_type_proto(_ELEMENTS[dtype], sizes)
