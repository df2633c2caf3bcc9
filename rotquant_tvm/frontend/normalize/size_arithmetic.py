"""Dimensions that are expressions in a function's symbolic sizes: their numbers, their sizes, equality."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm_ffi import structural_map, structural_walk

Size = Any
"""An int, or an expression in symbolic sizes (TVM's types are opaque to type checkers)."""

_BINARY: dict[str, Any] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
           "FloorMod": operator.mod, "Min": min, "Max": max}  # fmt: skip


class UnknownSize(Exception):
    """A size that the given numbers do not determine."""


def number(size: Size, sizes: Mapping[tirx.Var, int]) -> int:
    """The number that an expression has for these ``sizes``. Raises UnknownSize if they do not tell."""
    if isinstance(size, int):
        return size
    if isinstance(size, tirx.IntImm):
        return int(size)
    if isinstance(size, tirx.Var):
        if size not in sizes:
            raise UnknownSize(size.name)
        return sizes[size]
    kind = _BINARY.get(type(size).__name__)
    if kind is not None:
        return int(kind(number(size.a, sizes), number(size.b, sizes)))
    value = tvm.sym.Analyzer().simplify(substitute(size, dict(sizes)))
    if not isinstance(value, tirx.IntImm):
        raise UnknownSize(str(size))
    return int(value)


def substitute(size: tvm.ir.Expr, replaced: Mapping[tirx.Var, Size]) -> tvm.ir.Expr:
    """The expression with sizes replaced."""

    def new(var: tirx.Var) -> tvm.ir.Expr:
        value = replaced.get(var, var)
        return tirx.IntImm("int64", value) if isinstance(value, int) else value

    return structural_map(size, (tirx.Var, new))


def size_vars(value: object) -> set[tirx.Var]:
    """The symbolic sizes in an expression, a type or a list of them."""
    found: list[tirx.Var] = []
    structural_walk(value, (tirx.Var, found.append))
    return {var for var in found if isinstance(var.ty, tvm.ir.PrimType)}


def same_size(one: Size, other: Size) -> bool:
    """Whether two sizes are equal whatever the symbolic ones are."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return bool(tvm.sym.Analyzer().can_prove_equal(one, other))
