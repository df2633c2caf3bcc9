"""TVM's own converters of ONNX's operators, for those that we have none for."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.onnx_import.registry import Converter, OnnxNode, UnsupportedNode

_REFUSED = frozenset({"Attention", "If", "Loop", "Scan", "Constant"})
"""Names under which TVM has something else (com.microsoft's Attention), or that its importer handles elsewhere."""

_OF_SEQUENCES = ("Sequence", "ConcatFromSequence", "SplitToSequence")
"""How names of operators on lists of tensors begin. Values here are tensors, which TVM would take for endless lists."""


def upstream_converter(op_type: str, opset: int) -> Converter | None:
    """TVM's converter of a standard operator as one of ours, or None."""
    converters = onnx_frontend._get_convert_map()
    if op_type not in converters or op_type in _REFUSED or op_type.startswith(_OF_SEQUENCES):
        return None
    function = converters[op_type].get_converter(opset)

    def convert(node: OnnxNode) -> Any:
        attributes = {name: _bytes(value) for name, value in node.attributes.items()}
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
        functions = len(node.state.builder.get().functions)
        try:
            result = function(node.state.builder, onnx_frontend.onnx_input(node.inputs), attributes, [{}, {}])
            result = node.state.builder.normalize(result) if isinstance(result, relax.Expr) else result
        except UnsupportedNode:
            raise
        except Exception as error:  # TVM raises many types
            raise UnsupportedNode(f"TVM cannot convert it: {first_line(error)}") from error
        if len(node.state.builder.get().functions) > functions:
            raise UnsupportedNode("TVM has only a function of its own for it, which no later step understands")
        return [_rebound(node, field) for field in _fields(node, result)]

    return convert


def _rebound(node: OnnxNode, result: relax.Expr) -> relax.Expr:
    """A result whose shape is checked like that of every other, also where TVM has bound it already."""
    return node.emit(result) if isinstance(result, relax.Var) else result


def _fields(node: OnnxNode, result: Any) -> list[relax.Expr]:
    if isinstance(result, relax.Tuple):
        return list(result.fields)
    if not isinstance(result, relax.Expr):
        raise UnsupportedNode("TVM converts it to something that is no tensor")
    if isinstance(result.ty, relax.TupleType):
        result = node.emit(result)
        return [node.emit(relax.TupleGetItem(result, index)) for index in range(len(result.ty.fields))]
    return [result]


def _bytes(value: Any) -> Any:
    """Strings as TVM's converters expect them."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return tuple(each.encode() for each in value)
    return value
