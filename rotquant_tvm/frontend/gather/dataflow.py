"""A Relax function as its bindings: what a variable is, who reads it."""

from __future__ import annotations

import networkx as nx
import tvm
from tvm import relax

from rotquant_tvm.passes.find_attention import dataflow_graph

FLOATS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


class Dataflow:
    """The bindings of ``function``; ``graph`` has an edge from each variable to those computed from it."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.values: dict[relax.Var, relax.Expr] = dict(relax.analysis.get_var2val(function))
        self.graph: nx.DiGraph = dataflow_graph(function)
        self.bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self.parameters = set(function.params)

    def root(self, expr: relax.Expr) -> relax.Expr:
        """Follow plain renamings, and fields of tuples that are written out, to where an expression is bound."""
        while True:
            value = self.values.get(expr) if isinstance(expr, relax.Var) else expr
            if isinstance(value, relax.Var):
                expr = value
            elif isinstance(value, relax.TupleGetItem) and isinstance(
                whole := self.value(value.tuple_value), relax.Tuple
            ):
                expr = whole.fields[value.index]
            else:
                return expr

    def value(self, expr: relax.Expr) -> relax.Expr:
        """Return the call, tuple or constant behind an expression; parameters are themselves."""
        root = self.root(expr)
        return self.values.get(root, root) if isinstance(root, relax.Var) else root

    def call(self, expr: relax.Expr, *names: str) -> relax.Call | None:
        """Return the call behind an expression if its operator is ``relax.`` and one of ``names`` (any if empty)."""
        value = self.value(expr)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        return value if not names or value.op.name.removeprefix("relax.") in names else None

    def operator(self, expr: relax.Expr) -> str:
        """Return the name of the operator that computes an expression, or what it is instead."""
        call = self.call(expr)
        if call is not None:
            return str(call.op.name)
        value = self.value(expr)
        return "a parameter" if value in self.parameters else type(value).__name__

    def fields(self, expr: relax.Expr) -> list[relax.Expr]:
        """Return the fields of a tuple that is written out, else none."""
        value = self.value(expr)
        return list(value.fields) if isinstance(value, relax.Tuple) else []

    def uncast(self, expr: relax.Expr) -> relax.Expr:
        """Follow casts between float types, and renamings, to what was cast."""
        root = self.root(expr)
        while (source := self.float_cast(root)) is not None:
            root = self.root(source)
        return root

    def float_cast(self, expr: relax.Expr) -> relax.Expr | None:
        """Return what an expression is a cast of from one float type to another, else None."""
        call = self.call(expr, "astype")
        if call is None or not {dtype_of(call), dtype_of(call.args[0])} <= FLOATS.keys():
            return None
        return call.args[0]


def dtype_of(expr: relax.Expr) -> str:
    """Return the name of a tensor's dtype; empty for what is no tensor."""
    dtype = getattr(expr.ty, "dtype", None)
    return str(getattr(dtype, "dtype", dtype) or "")
