"""Pasts that a file declares as buffers of a fixed size: as long as what they hold, like any other past."""

from __future__ import annotations

import onnx

from rotquant_tvm.frontend.onnx_import.model_file import all_nodes

_PAST = {"GroupQueryAttention": (3, 4)}
"""Operators that are told how many tokens a buffer holds, and their inputs that may be buffers."""

_NAME = "past_sequence_length"


def open_shared_buffers(graph: onnx.GraphProto) -> None:
    """Give the length of such pasts among the graph's inputs a name in the place of a number.

    A past whose memory is shared with the present is declared with the size of that memory. The operator reads only the
    tokens that are there, so it computes the same of a past of exactly that length.
    """
    buffers = {
        node.input[index]
        for node in all_nodes(graph)
        if node.domain == "com.microsoft" and node.op_type in _PAST
        for index in _PAST[node.op_type]
        if index < len(node.input)
    }
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in buffers and len(dims) == 4 and dims[2].HasField("dim_value"):
            dims[2].dim_param = _NAME
