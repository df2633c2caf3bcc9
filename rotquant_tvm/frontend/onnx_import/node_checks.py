"""Refusals of inputs, outputs and attributes that ask for what is not supported."""

from __future__ import annotations

from tvm import relax

from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode


def refuse_inputs(node: OnnxNode, inputs: dict[int, str]) -> None:
    """Raise UnsupportedNode if one of these inputs is given; the texts say what it would ask for."""
    for index, what in inputs.items():
        if node.value(index) is not None:
            raise UnsupportedNode(f"it has {what}, which is not supported")


def required(node: OnnxNode, index: int) -> relax.Expr:
    """Input ``index``. Raises UnsupportedNode if it is absent."""
    value = node.input(index)
    if value is None:
        raise UnsupportedNode(f"its input {index} is absent")
    return value


def refuse_outputs(node: OnnxNode, outputs: dict[int, str]) -> None:
    """Raise UnsupportedNode if the graph asks for one of these outputs."""
    for index, what in outputs.items():
        if node.wants(index):
            raise UnsupportedNode(f"the graph reads {what}, which is not supported")


def refuse_attributes(node: OnnxNode, usual: dict[str, tuple[object, ...]]) -> None:
    """Raise UnsupportedNode if an attribute has a value other than its usual ones."""
    for name, values in usual.items():
        value = node.attribute(name, values[0])
        if value not in values:
            raise UnsupportedNode(f"its attribute {name} is {value!r}; only {values[0]!r} is supported")


def positive(node: OnnxNode, name: str) -> int:
    """An attribute that counts something. Raises UnsupportedNode if it is absent or not positive."""
    count = node.attribute(name)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedNode(f"its attribute {name} is {count!r}; a positive number is needed")
    return count
