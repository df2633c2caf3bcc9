"""Names of dynamic sizes, which exporters also write as expressions: "past_sequence_length + sequence_length"."""

from __future__ import annotations

import ast
from typing import Any

from tvm import tirx

_MAX_LENGTH = 200

_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: tirx.floordiv,
    ast.Div: tirx.floordiv,
    ast.Mod: tirx.floormod,
}


def parse_size(text: str, variables: dict[str, Any]) -> Any:
    """Read a size's name: an int, what ``variables`` has under it (a variable is added if it is new), or an expression.

    What is no expression of names, integers, + - * // % and Max or Min is one name.
    """
    known = dict(variables)
    try:
        if len(text) > _MAX_LENGTH:
            raise ValueError
        size = _read(ast.parse(text.strip(), mode="eval").body, known)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _variable(text[:_MAX_LENGTH], variables)
    variables.update(known)
    return size


def _read(node: ast.expr, variables: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 1 << 40:
        return node.value
    if isinstance(node, ast.Name):
        return _variable(node.id, variables)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _read(node.left, variables), _read(node.right, variables)
        if isinstance(left, int) and isinstance(right, int):
            raise ValueError  # no exporter writes sums of numbers
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Max", "Min"):
        first, *rest = (_read(each, variables) for each in node.args)
        for each in rest:
            first = (tirx.max if node.func.id == "Max" else tirx.min)(first, each)
        return first
    raise ValueError


def _variable(name: str, variables: dict[str, Any]) -> Any:
    if name not in variables:
        variables[name] = tirx.Var("".join(c if c.isalnum() else "_" for c in name) or "size", "int64")
    return variables[name]
