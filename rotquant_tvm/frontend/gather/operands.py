"""Queries, keys and values: the tensors that a product's operands are made of by layout, casts and scaling alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import relax

from .axes import Axes, AxisSpace
from .dataflow import FLOATS, Dataflow, dtype_of
from .layouts import View, broadcast_axes, source_view
from .uniform import uniform


@dataclass(frozen=True)
class Stage:
    """A tensor on the way to an operand, which is ``factor`` times it in another layout."""

    expr: relax.Expr
    axes: Axes
    factor: float

    @property
    def dtype(self) -> str:
        """The tensor's dtype."""
        return dtype_of(self.expr)


def read_operand(flow: Dataflow, space: AxisSpace, view: View, scaled: bool) -> list[Stage]:
    """Return the stages from an operand back to what is computed otherwise; factors are followed if ``scaled``.

    Casts are followed to narrower floats only: what rounds belongs to the operand.
    """
    stages = [Stage(*view, 1.0)]
    while True:
        last = stages[-1]
        source = source_view(flow, space, (last.expr, last.axes))
        factor = 1.0
        if source is None and (found := _unscaled(flow, last) if scaled else None) is not None:
            source, factor = found
        if source is None:
            source = _widened(flow, last)
        if source is None:
            return stages
        stages.append(Stage(*source, last.factor * factor))


def _widened(flow: Dataflow, stage: Stage) -> View | None:
    source = flow.float_cast(stage.expr)
    if source is None:
        return None
    narrow, wide = dtype_of(source), stage.dtype
    return (source, stage.axes) if FLOATS[narrow] < FLOATS[wide] or narrow == wide else None


def _unscaled(flow: Dataflow, stage: Stage) -> tuple[View, float] | None:
    """Return what a stage is a constant multiple of, and the constant."""
    call = flow.call(stage.expr, "multiply", "divide", "negative")
    if call is None:
        return None
    sides = [(call.args[0], None)] if len(call.args) == 1 else [tuple(call.args), tuple(call.args)[::-1]]
    for rest, by in sides[: 1 if call.op.name == "relax.divide" else 2]:
        value = -1.0 if by is None else uniform(flow, by)
        if value and math.isfinite(value):
            value = 1 / value if call.op.name == "relax.divide" else value
            return (rest, broadcast_axes(rest, stage.axes)), value
    return None


def topmost(space: AxisSpace, stages: list[Stage], layout: Axes, dtype: str, unscaled: bool) -> Stage:
    """Return the earliest computed stage of ``dtype``, in ``layout`` if any has it; the earliest without the dtype.

    ``unscaled``: being earliest, and so without any factor, matters more than the layout.
    """
    typed = [stage for stage in stages if stage.dtype == dtype] or stages
    fitting = [stage for stage in typed if tuple(map(space.resolve, stage.axes)) == layout]
    if unscaled:
        fitting = [stage for stage in fitting if stage.factor == typed[-1].factor]
    return (fitting or typed)[-1]
