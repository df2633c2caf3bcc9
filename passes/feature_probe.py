"""Following features through a function: small parts of it are evaluated in NumPy, on small sizes and random data.

How the dimensions of a head come from the columns of a linear layer, and whether a map on them commutes with what
lies between, are properties of the dataflow. Patterns of operators would have to know every spelling; instead the
operators between are evaluated on random numbers, in float64. Two analytic maps that agree there agree everywhere, but
for chance that has probability 0 (Schwartz and Zippel's argument).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm_ffi import structural_walk

from .find_attention import dataflow_graph

Array = NDArray[Any]
SIZES = {"batch": 1, "seq": 2}
OTHER_SIZE = 5
"""What symbolic sizes are in a probe, by name; all others are ``OTHER_SIZE``."""

_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "negative": np.negative,
    "cos": np.cos,
    "sin": np.sin,
    "astype": lambda x: x,
}
_MOVES = ("reshape", "permute_dims", "strided_slice", "split", "concat", "expand_dims", "squeeze", "broadcast_to")
_COPIES = ("concat", "broadcast_to")
"""Moves that join tensors, or repeat elements; so may "take"."""


class FeatureProbe:
    """Evaluates variables of one Relax function; whatever it cannot evaluate is a *leaf*, a fixed random tensor."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.graph = dataflow_graph(func)
        self._random = np.random.default_rng(0)
        self._leaves: dict[relax.Var, Array] = {}
        self._shapes: dict[relax.Var, tuple[int, ...]] = {}
        self._read: dict[relax.Expr, list[relax.Expr] | None] = {}

    @cached_property
    def ids_dependent(self) -> set[relax.Var]:
        """The variables that the ids (the first parameter) have gone into."""
        return {self.func.params[0], *nx.descendants(self.graph, self.func.params[0])}

    @cached_property
    def positions_dependent(self) -> set[relax.Var]:
        """The variables that the positions (an imported function's second parameter) have gone into."""
        return {self.func.params[1], *nx.descendants(self.graph, self.func.params[1])}

    def after(self, var: relax.Var, within: set[relax.Var]) -> set[relax.Var]:
        """The variables of ``within`` that ``var`` goes into by way of others of it alone, itself included."""
        found, waiting = {var}, [var]
        while waiting:
            for user in self.graph.successors(waiting.pop()):
                if user in within and user not in found:
                    found.add(user)
                    waiting.append(user)
        return found

    def reaches(self, var: relax.Var, other: relax.Var) -> bool:
        """Whether ``var`` has gone into ``other``."""
        return not var.same_as(other) and nx.has_path(self.graph, var, other)

    def value(self, var: relax.Expr) -> Any:
        """What a variable is bound to; None for a parameter, and what is no variable of the function."""
        return self.graph.nodes[var].get("value") if var in self.graph else None

    def operator(self, var: relax.Expr) -> str:
        """The operator that a variable is bound to, without its dialect; empty for everything else."""
        return operator_name(self.value(var))

    def readers(self, var: relax.Var) -> list[relax.Var]:
        """The variables bound to what reads ``var``; the function's result counts, as whatever it is bound to."""
        return list(self.graph.successors(var))

    def region(self, end: relax.Var) -> tuple[set[relax.Var], list[relax.Var]]:
        """(variables between, ``end`` included; leaves) of what a probe evaluates for ``end``."""
        inside: set[relax.Var] = set()
        leaves: list[relax.Var] = []
        waiting = [end]
        while waiting:
            var = waiting.pop()
            if var in inside or any(var.same_as(leaf) for leaf in leaves):
                continue
            operands = self._operands(var)
            if operands is None:
                leaves.append(var)
            else:
                inside.add(var)
                waiting += [operand for operand in operands if isinstance(operand, relax.Var)]
        return inside, leaves

    def only_moves(self, var: relax.Var) -> bool:
        """Whether a variable holds elements of one other, each at most once, moved or converted but not changed."""
        value = self.value(var)
        if isinstance(value, relax.Var | relax.TupleGetItem):
            return self._operands(var) is not None
        name = self.operator(var)
        if name == "take":
            taken = _taken(value)
            return taken is not None and np.unique(taken).size == taken.size
        return (name == "astype" or (name in _MOVES and name not in _COPIES)) and self._operands(var) is not None

    def shape(self, var: relax.Var) -> tuple[int, ...]:
        """The extents of a variable in a probe."""
        if var not in self._shapes:
            self._shapes[var] = tuple(_size(extent) for extent in var.ty.shape)
        return self._shapes[var]

    def evaluate(self, var: relax.Expr, given: Mapping[relax.Var, Array]) -> Any:
        """A variable's value where those of ``given`` have these values: an array, or a list for a tuple."""
        return self._evaluate(var, dict(given))

    def _evaluate(self, var: relax.Expr, known: dict[relax.Expr, Any]) -> Any:
        if isinstance(var, tvm.ir.GenericConst):
            return np.asarray(var.value.numpy(), np.float64)
        if var not in known:
            operands = self._operands(var)
            if operands is None:
                known[var] = self._leaf(var)
            else:
                known[var] = self._apply(var, [self._evaluate(operand, known) for operand in operands])
        return known[var]

    def _leaf(self, var: relax.Var) -> Array:
        if var not in self._leaves:
            self._leaves[var] = self._random.standard_normal(self.shape(var))
        return self._leaves[var]

    def _operands(self, var: relax.Expr) -> list[relax.Expr] | None:
        """What a variable is evaluated from; None for a leaf."""
        if var not in self._read:
            self._read[var] = self._find_operands(var)
        return self._read[var]

    def _find_operands(self, var: relax.Expr) -> list[relax.Expr] | None:
        value = self.value(var)
        if isinstance(value, relax.Var):
            return [value]
        if isinstance(value, relax.TupleGetItem):
            return [value.tuple_value] if self.operator(value.tuple_value) == "split" else None
        name = operator_name(value)
        if name == "concat":
            fields = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else None
            return None if fields is None else list(fields)
        if name == "strided_slice" and _slice(value) is None:
            return None
        if name == "take":
            return None if _taken(value) is None else [value.args[0]]
        if name not in (*_MOVES, *_ELEMENTWISE):
            return None
        return [arg for arg in value.args if isinstance(arg, relax.Var | tvm.ir.GenericConst) and _is_tensor(arg)]

    def _apply(self, var: relax.Var, operands: list[Any]) -> Any:
        value, name = self.value(var), self.operator(var)
        if isinstance(value, relax.Var):
            return operands[0]
        if isinstance(value, relax.TupleGetItem):
            return operands[0][value.index]
        if name in _ELEMENTWISE:
            return _ELEMENTWISE[name](*operands)
        x = operands[0]
        if name == "concat":
            return np.concatenate(operands, 0 if value.attrs.axis is None else int(value.attrs.axis))
        if name == "permute_dims":
            axes = value.attrs.axes
            return np.transpose(x, None if axes is None else [int(axis) for axis in axes])
        if name == "split":
            parts = value.attrs.indices_or_sections
            where = int(parts) if isinstance(parts, int | tvm.tirx.IntImm) else [int(part) for part in parts]
            return np.array_split(x, where, int(value.attrs.axis))
        if name == "strided_slice":
            return x[_slice(value)]
        if name == "take":
            return np.take(x, _taken(value), int(value.attrs.axis))
        if name == "broadcast_to":
            return np.broadcast_to(x, self.shape(var))
        return np.reshape(x, self.shape(var))  # reshape, expand_dims, squeeze


def operator_name(value: Any) -> str:
    """The operator of a call, without its dialect: ``nn.attention``; empty for everything else."""
    name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
    return str(name).removeprefix("relax.")


def _is_tensor(value: relax.Expr) -> bool:
    return isinstance(value.ty, relax.TensorType)


def _slice(call: relax.Call) -> tuple[slice, ...] | None:
    """A ``strided_slice`` of constants as NumPy's index."""
    columns = [[_constant(field) for field in arg.fields] for arg in call.args[1:] if isinstance(arg, relax.Tuple)]
    if len(columns) < 3 or any(value is None for column in columns for value in column):
        return None
    axes, begins, ends = columns[:3]
    steps = columns[3] if len(columns) > 3 else [1] * len(axes)
    index = [slice(None)] * call.args[0].ty.ndim
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        index[axis] = slice(begin, None if end >= 2**62 else end, step)
    return tuple(index)


def _taken(call: relax.Call) -> Array | None:
    """The indices of a ``take``, if they are constants along an axis, none of them negative."""
    index = call.args[1]
    if not isinstance(index, tvm.ir.GenericConst) or call.attrs.axis is None:
        return None
    found: Array = index.value.numpy()
    return found if found.min(initial=0) >= 0 else None


def _constant(value: Any) -> int | None:
    value = getattr(value, "value", value)
    return int(value) if isinstance(value, int | tvm.tirx.IntImm) else None


def _size(extent: Any) -> int:
    """A size whose symbolic parts have the sizes of a probe."""
    if isinstance(extent, tvm.tirx.IntImm):
        return int(extent)
    found: list[tvm.tirx.Var] = []
    structural_walk(extent, (tvm.tirx.Var, found.append))
    analyzer = tvm.sym.Analyzer()
    for var in set(found):
        analyzer.bind(var, tvm.tirx.const(SIZES.get(var.name, OTHER_SIZE), var.ty.dtype))
    return int(analyzer.simplify(extent))
