"""Shapes that TVM leaves open where a slice may end early, told by the tensors beside it."""

from __future__ import annotations

from tvm import relax, tirx

from .axes import shape_of
from .dataflow import Dataflow

_ELEMENTWISE = {
    *("where", "add", "subtract", "multiply", "divide", "maximum", "minimum", "clip", "astype", "negative", "tanh"),
    *("nn.softmax", "logical_not"),
}


def likely_shape(flow: Dataflow, expr: relax.Expr) -> list[tirx.PrimExpr] | None:
    """Return the shape of a tensor, where it is unknown the one that its operands have; None if they do not tell.

    Sizes of an elementwise result are those of its operands, but for extents of 1. Where operands disagree, that
    of most axes of other extents is believed: what it is added to has to fit.
    """
    shape = shape_of(expr)
    if shape is not None:
        return shape
    call = flow.call(expr, "matmul", *_ELEMENTWISE)
    rank = expr.ty.ndim
    if call is None:
        return None
    operands = [operand for operand in call.args if getattr(operand.ty, "ndim", 0) > 0]
    shapes = [shape for operand in operands if (shape := likely_shape(flow, operand)) is not None]
    if call.op.name == "relax.matmul":
        if len(shapes) < 2 or min(map(len, shapes)) < 2:
            return None
        return [*_joined([shape[:-2] for shape in shapes], rank - 2), shapes[0][-2], shapes[1][-1]]
    return _joined(shapes, rank) if shapes and max(map(len, shapes)) == rank else None


def _joined(shapes: list[list[tirx.PrimExpr]], rank: int) -> list[tirx.PrimExpr]:
    """Broadcast shapes, those with the most extents other than 1 first."""
    result: list[tirx.PrimExpr] = [tirx.IntImm("int64", 1)] * rank
    for shape in sorted(shapes, key=lambda sizes: sum(map(_is_one, sizes)) + rank - len(sizes)):
        for place, size in enumerate(shape, rank - len(shape)):
            if _is_one(result[place]):
                result[place] = size
    return result


def _is_one(size: tirx.PrimExpr) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1
