"""A model's own functions, put in the place of the nodes that call them."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import inliner

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.onnx_import.graph_order import inner_graphs

_MAX_NODES = 1_000_000


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without functions of its own.

    Raises ModelError if functions call each other in a circle, or would become absurdly many nodes.
    """
    if not model.functions:
        return model
    functions = {(function.domain, function.name): function for function in model.functions}
    calls = {key: [call for node in function.node for call in _calls(node)] for key, function in functions.items()}
    try:
        order = list(TopologicalSorter({key: set(each) & set(functions) for key, each in calls.items()}).static_order())
    except CycleError as error:
        names = " → ".join(name for _, name in error.args[1][:6])
        raise ModelError(f"its functions call each other in a circle: {names}") from error
    sizes: dict[tuple[str, str], int] = {}
    for key in order:
        sizes[key] = sum(sizes.get(call, 1) for call in calls[key])
    total = sum(sizes.get(call, 1) for node in model.graph.node for call in _calls(node))
    if total > _MAX_NODES:
        raise ModelError(f"its functions unfold to {total} nodes; more than {_MAX_NODES} are refused")
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # the inliner raises many types
        raise ModelError(f"its functions cannot be put in place: {first_line(error)}") from error


def _calls(node: onnx.NodeProto) -> list[tuple[str, str]]:
    """(domain, operator) of a node and of the nodes in its graphs."""
    return [(node.domain, node.op_type)] + [
        call for graph in inner_graphs(node) for inner in graph.node for call in _calls(inner)
    ]
