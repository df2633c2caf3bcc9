"""Emitting a tensor in another layout with as few operators as it takes."""

from __future__ import annotations

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from .axes import Atom, Axes, Axis, AxisSpace, shape_of
from .dataflow import dtype_of


class Emitter:
    """Collects bindings; ``dataflow`` says whether they stand in a dataflow block."""

    def __init__(self, dataflow: bool) -> None:
        self.bindings: list[relax.Binding] = []
        self._builder = relax.BlockBuilder()
        self._new_var = relax.DataflowVar if dataflow else relax.Var

    def emit(self, call: relax.Expr) -> relax.Var:
        """Bind a call to a new variable."""
        call = self._builder.normalize(call)
        var = self._new_var("attn", call.ty)
        self.bindings.append(relax.VarBinding(var, call))
        return var

    def cast(self, expr: relax.Expr, shape: list[tirx.PrimExpr]) -> relax.Expr:
        """Give a tensor the shape that it must have, where TVM cannot tell that it has."""
        own, analyzer = shape_of(expr), tvm.sym.Analyzer()
        if own is not None and all(map(analyzer.can_prove_equal, own, shape)):
            return expr
        wanted = relax.TensorType(shape, dtype_of(expr))
        var = self._new_var("attn", wanted)
        self.bindings.append(relax.MatchCast(var, expr, wanted))
        return var

    def bind(self, var: relax.Var, value: relax.Expr) -> None:
        """Make an expression the value of a given variable, the last call directly."""
        if self.bindings[-1].var.same_as(value) and isinstance(self.bindings[-1], relax.VarBinding):
            value = self.bindings.pop().value
        self.bindings.append(relax.VarBinding(var, value))

    def layout(self, space: AxisSpace, expr: relax.Expr, axes: Axes, wanted: Axes) -> relax.Expr:
        """Return ``expr`` in the layout ``wanted``.

        Of atoms that are not wanted index 0 is taken; those that ``expr`` does not have become extents of 1.
        """
        axes = tuple(map(space.resolve, axes))
        present = {atom for axis in axes for atom in axis}
        wanted = tuple(tuple(atom for atom in space.resolve(axis) if atom in present) for axis in wanted)
        if axes == wanted:
            return expr
        if (order := _permutation(axes, wanted)) is not None:
            return self.emit(R.permute_dims(expr, order))
        target = [atom for axis in wanted for atom in axis]
        units = _units(axes, target)
        if units != [axis for axis in axes if axis] or len(units) != len(axes):
            expr = self.emit(R.reshape(expr, [space.size(unit) for unit in units]))
        for place in reversed(range(len(units))):
            if units[place][0] not in target:
                expr = self.emit(R.take(expr, relax.const(0, "int64"), axis=place, mode="clip"))
                del units[place]
        order = sorted(range(len(units)), key=lambda place: target.index(units[place][0]))
        if order != list(range(len(units))):
            expr = self.emit(R.permute_dims(expr, order))
            units = [units[place] for place in order]
        if list(wanted) != units:
            expr = self.emit(R.reshape(expr, [space.size(axis) for axis in wanted]))
        return expr


def _permutation(axes: Axes, wanted: Axes) -> list[int] | None:
    """Return the order in which ``axes`` are ``wanted``, if each is one of them."""
    if len(axes) != len(wanted):
        return None
    order: list[int] = []
    for axis in wanted:
        places = [place for place, own in enumerate(axes) if own == axis and place not in order]
        if not places:
            return None
        order.append(places[0])
    return order


def _units(axes: Axes, target: list[Atom]) -> list[Axis]:
    """Cut the axes into what moves as one: rows of atoms that stay neighbours."""
    units: list[Axis] = []
    for axis in axes:
        unit: Axis = ()
        for atom in axis:
            if unit and not _follows(atom, unit[-1], target):
                units.append(unit)
                unit = ()
            unit = (*unit, atom)
        if unit:
            units.append(unit)
    return units


def _follows(atom: Atom, other: Atom, target: list[Atom]) -> bool:
    return {atom, other} <= set(target) and target.index(atom) == target.index(other) + 1
