"""If: the branch that a condition known at import takes, and the cached branch of a merged decoder.

Exporters (optimum's ``decoder_model_merged``) put a decoder without and one with past keys and values in one file,
under one If on the input ``use_cache_branch``. A session always has a cache, be it empty, so the cached branch is it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from tvm import relax

from rotquant_tvm.frontend.onnx_import.graph_order import inner_graphs
from rotquant_tvm.frontend.onnx_import.graph_state import GraphState
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter

USE_CACHE = "use_cache_branch"
"""The input by which a merged decoder chooses its branch."""


@onnx_converter("", "If")
def _if(node: OnnxNode) -> tuple[relax.Expr, ...]:
    branches = [node.attribute(name) for name in ("then_branch", "else_branch")]
    if not all(isinstance(branch, onnx.GraphProto) for branch in branches):
        raise UnsupportedNode("it lacks one of its branches")
    known = node.known(0)
    if known is not None and known.is_number and known.array.size == 1:
        chosen = branches[0] if bool(known.array.ravel()[0]) else branches[1]
    elif _is_cache_switch(node.value(0), node.state):
        chosen = _cached_branch(node, branches)
    else:
        raise UnsupportedNode(
            "its condition is known only when the model runs; export one decoder with a cache, or a merged one that "
            f"chooses by the input {USE_CACHE!r}"
        )
    return tuple(node.convert_graph(chosen))


def _is_cache_switch(value: object, state: GraphState) -> bool:
    """Whether a condition is the input ``use_cache_branch``, reshaped or not."""
    while isinstance(value, relax.Var) and (bound := state.builder.lookup_binding(value)) is not None:
        name = getattr(getattr(bound, "op", None), "name", "")
        if name not in ("relax.squeeze", "relax.reshape", "relax.astype"):
            return False
        value = bound.args[0]
    return isinstance(value, relax.Var) and value.name == USE_CACHE


def _cached_branch(node: OnnxNode, branches: list[onnx.GraphProto]) -> onnx.GraphProto:
    """The branch for a set switch, once it is sure that it reads a past."""
    if not any(_is_past(node, name) for name in _names_read(branches[0])):
        raise UnsupportedNode(f"its branch for {USE_CACHE!r} reads no past keys and values")
    notes = node.state.config.setdefault("notes", [])
    notes.append(f"of the two decoders in one file, the one with a cache was taken ({USE_CACHE} = true)")
    return branches[0]


def _is_past(node: OnnxNode, name: str) -> bool:
    """Whether an outer name is a graph input with the axes of a cache."""
    value = node.state.graph_inputs.get(name)
    return value is not None and value.ty.ndim in (4, 5)


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    for inner in graph.node:
        yield from inner.input
        for nested in inner_graphs(inner):
            yield from _names_read(nested)
    yield from (output.name for output in graph.output)
