"""The names of a graph: each given once, before it is read."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import onnx

from rotquant_tvm.errors import ModelError


def check_names(graph: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> None:
    """Check that every name is given once and every name that is read is given, in inner graphs too.

    ``outer``: the names that the graphs around this one give. Raises ModelError with the name and its reader.
    """
    given = _given(graph)
    visible = outer | given
    for node in graph.node:
        for name in node.input:
            if name and name not in visible:
                raise ModelError(f"the node {_title(node)} reads {name!r}, which nothing gives")
        for inner in inner_graphs(node):
            check_names(inner, visible)
    for output in graph.output:
        if output.name not in visible:
            raise ModelError(f"the output {output.name!r} is given by no node")


def _given(graph: onnx.GraphProto) -> frozenset[str]:
    """The names that a graph gives. An initializer may give an input of the same name its value."""
    names: set[str] = set()
    initializers = [tensor.name for tensor in graph.initializer]
    outputs = [name for node in graph.node for name in node.output if name]
    overridden = set(initializers)
    inputs = [value.name for value in graph.input if value.name not in overridden]
    for name in [*inputs, *initializers, *outputs]:
        if not name:
            raise ModelError("it has an input or an initializer without a name")
        if name in names:
            raise ModelError(f"the name {name!r} is given twice")
        names.add(name)
    return frozenset(names)


def in_order(graph: onnx.GraphProto) -> None:
    """Put the nodes of a graph, and of its inner graphs, in an order in which each reads what came before.

    A graph that is in order already stays as it is. Raises ModelError if there is a cycle.
    """
    nodes = list(graph.node)
    for node in nodes:
        for inner in inner_graphs(node):
            in_order(inner)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = {index: {makers[name] for name in _reads(node) if name in makers} for index, node in enumerate(nodes)}
    if all(need < index for index, indices in needs.items() for need in indices):
        return
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = " → ".join(_title(nodes[index]) for index in error.args[1][:6])
        raise ModelError(f"its nodes form a cycle: {names}") from error
    copies = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(copies)


def _reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, those that its inner graphs take from outside among them."""
    names = {name for name in node.input if name}
    for inner in inner_graphs(node):
        read = {name for each in inner.node for name in _reads(each)} | {output.name for output in inner.output}
        names |= read - _given(inner)
    return names


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    graphs: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            graphs.append(attribute.g)
        graphs.extend(attribute.graphs)
    return graphs


def _title(node: onnx.NodeProto) -> str:
    return repr(node.name or next(iter(node.output), "")) + f" ({node.op_type})"
