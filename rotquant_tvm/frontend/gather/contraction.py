"""Products of two tensors that sum over one axis: ``matmul`` and ``einsum``."""

from __future__ import annotations

import string
from dataclasses import dataclass

from tvm import relax

from .axes import Axes, Axis, AxisSpace, shape_of
from .dataflow import Dataflow
from .layouts import View, broadcast_axes
from .likely_shape import likely_shape


@dataclass(frozen=True)
class Contraction:
    """A product ``result`` of ``left`` and ``right``, summed over ``contracted``.

    ``left_rows`` and ``right_rows`` are the result's axes that one operand alone runs over by its shape: not
    those along which the other one is repeated.
    """

    result: View
    left: View
    right: View
    contracted: Axis
    left_rows: Axis
    right_rows: Axis

    def swapped(self) -> Contraction:
        """Return the product with its operands exchanged."""
        return Contraction(self.result, self.right, self.left, self.contracted, self.right_rows, self.left_rows)


def contraction(flow: Dataflow, space: AxisSpace, view: View) -> Contraction | None:
    """Read a tensor with known axes as a product; None if it is none, or has vectors or diagonals in it."""
    view = (view[0], broadcast_axes(*view))
    if (call := flow.call(view[0], "matmul")) is not None:
        return _matmul(flow, space, call, view)
    if (call := flow.call(view[0], "einsum")) is not None:
        return _einsum(flow, space, call, view)
    return None


def _matmul(flow: Dataflow, space: AxisSpace, call: relax.Call, view: View) -> Contraction | None:
    left, right = call.args
    left_shape = likely_shape(flow, left)
    if left_shape is None or min(left.ty.ndim, right.ty.ndim) < 2:
        return None
    *batch, rows, columns = view[1]
    contracted = space.axis(left_shape[-1])
    left_axes = (*broadcast_axes(left, (*batch, rows, ()))[:-1], contracted)
    right_axes = (*broadcast_axes(right, (*batch, (), columns))[:-2], contracted, columns)
    return Contraction(view, (left, left_axes), (right, right_axes), contracted, rows, columns)


def _einsum(flow: Dataflow, space: AxisSpace, call: relax.Call, view: View) -> Contraction | None:
    operands = flow.fields(call.args[0])
    shapes = [shape for operand in operands if (shape := shape_of(operand)) is not None]
    if not len(operands) == len(shapes) == 2:
        return None
    labels = _labels(str(call.attrs.subscripts), [operand.ty.ndim for operand in operands])
    if labels is None:
        return None
    *inputs, output = labels
    if any(len(set(text)) < len(text) for text in labels):
        return None
    axes = dict(zip(output, view[1], strict=True))
    shared = set(inputs[0]) & set(inputs[1])
    if (set(inputs[0]) | set(inputs[1])) - set(output) - shared:
        return None  # an axis of one operand alone is summed
    contracted = [label for label in inputs[0] if label in shared and label not in output]
    sizes = dict(zip(inputs[0], shapes[0], strict=True))
    axes |= {label: space.axis(sizes[label]) for label in contracted}
    views: list[View] = []
    for operand, text in zip(operands, inputs, strict=True):
        whole: Axes = tuple(axes[label] for label in text)
        views.append((operand, broadcast_axes(operand, whole)))
    rows = [
        tuple(atom for label in output if label in text and label not in shared for atom in axes[label])
        for text in inputs
    ]
    summed = tuple(atom for label in contracted for atom in axes[label])
    return Contraction(view, views[0], views[1], summed, rows[0], rows[1])


def _labels(subscripts: str, ranks: list[int]) -> list[str] | None:
    """Return the labels of both operands and the result, an ellipsis written out; None for what is not understood."""
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    free = [letter for letter in string.ascii_letters if letter not in text]
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=False)]
    if len(terms) != 2 or any(count < 0 for count in hidden):
        return None
    if any(count and "..." not in term for count, term in zip(hidden, terms, strict=True)) or max(hidden) > len(free):
        return None
    longest = "".join(free[: max(hidden)])
    whole = [
        term.replace("...", longest[len(longest) - count :]) for term, count in zip(terms, hidden, strict=True)
    ]
    if not arrow:
        both = whole[0] + whole[1]
        once = sorted(label for label in set(both) if both.count(label) == 1 and label not in longest)
        return [*whole, longest + "".join(once)]
    return [*whole, output.replace("...", longest)]
