"""The sizes of a program's inputs: numbers where torch found them fixed, one symbol where they must be equal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram


def settle_sizes(program: ExportedProgram) -> None:
    """Leave a shape that TVM's importer reads at every input of ``program``, in place.

    The importer takes a size that torch found to be 16 for a symbol of that name. And torch, left to find out which
    sizes vary, gives the past keys and the past values of a layer lengths of their own, which attention makes equal.
    """
    sizes: dict[sympy.Expr, torch.SymInt] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        for size in _shape(node):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(size.node.expr, size)
    same = _equal_symbols(program)
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = [_settled(size, same, sizes) for size in value.shape]
            node.meta["tensor_meta"] = SimpleNamespace(shape=shape, dtype=value.dtype)


def _settled(size: int | torch.SymInt, same: dict[Any, Any], sizes: dict[Any, torch.SymInt]) -> int | torch.SymInt:
    expression = same.get(expr := _expression(size), expr)
    if expression.is_number:
        return int(expression)
    return sizes.get(expression, size)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _equal_symbols(program: ExportedProgram) -> dict[sympy.Symbol, sympy.Symbol]:
    """Map symbols to others that they must equal for attention to be defined."""
    same: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    ):
        key, value = (_expression(_shape(operand)[-2]).subs(same) for operand in node.args[1:3])
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        lengths = [value] if mask is None else [value, _expression(_shape(mask)[-1]).subs(same)]
        for length in lengths:
            difference = sympy.expand(key - length)
            symbols = sorted(difference.free_symbols, key=str)
            if len(symbols) == 2 and difference in (symbols[0] - symbols[1], symbols[1] - symbols[0]):
                first, second = symbols
                same = {symbol: first if other == second else other for symbol, other in same.items()}
                same[second] = first
                key = key.subs(same)
    return same
