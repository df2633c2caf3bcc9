"""Whether a value of a token is computed from that token alone, wherever attention is not.

A source without a cache runs over all tokens at once, and only attention may mix them if it is to run over new ones
alone. So every element is labelled with the token that it is computed from, at one set of sizes, and the labels are
followed through the operators: an element of one operator is of one token, or of none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.array_operators import MOVING
from rotquant_tvm.frontend.normalize.cases import Case, StepInputs
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import IDS, PAST
from rotquant_tvm.frontend.normalize.live_graph import LiveGraph
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable, axes_of
from rotquant_tvm.frontend.normalize.positions import Positions
from rotquant_tvm.frontend.normalize.scalar_operators import ELEMENTWISE
from rotquant_tvm.frontend.normalize.step_view import dims, op_name

NONE = -1
"""The label of an element that no token has a part in. A whole array of them is None."""
REDUCTIONS = {"sum", "mean", "max", "min", "prod", "variance", "std", "argmax", "argmin"}
ALONG_AXES = {"nn.softmax": "axis", "nn.log_softmax": "axis", "nn.layer_norm": "axes", "nn.rms_norm": "axes",
              "cumsum": "axis", "cumprod": "axis", "topk": "axis", "argsort": "axis", "sort": "axis"}  # fmt: skip
"""Operators whose results are of the shape of the first operand, or less long in the axis."""

Labels = np.ndarray[Any, Any]


class _Mixed(Exception):
    """An operator computes an element from more than one token; the message says how."""


def check_per_token(step: StepInputs, live: LiveGraph, positions: Positions, source: str) -> None:
    """Check all of a step without a past, and of others what is computed from positions alone.

    Raises ModelError naming the operator that mixes tokens.
    """
    uncached = PAST not in step.roles.kinds
    roots = [*positions.values, *positions.rows]
    checked = set(live.order) if uncached else live.reached(roots) - live.tokens
    labels = _Labels(step, live, positions)
    for var in live.order:
        if var not in checked:
            continue
        try:
            labels.bind(var)
        except (_Mixed, Unevaluable) as error:
            what = f"relax.{step.view.op(var)}" if step.view.op(var) else "an operator"
            remedy = (
                "so the model cannot be given a cache; `simulate` measures its quality without one"
                if uncached
                else "so that what it makes of a position depends on other tokens; it is not supported"
            )
            where = f"{what} ({var.name}) mixes tokens outside of attention ({error})"
            raise ModelError(f"{source}: {where}, {remedy}") from None


class _Labels:
    """Labels of a step's values at one set of sizes."""

    def __init__(self, step: StepInputs, live: LiveGraph, positions: Positions) -> None:
        self.step, self.live, self.positions = step, live, positions
        case = Case(5 if PAST in step.roles.kinds else 0, 3)
        sizes = step.sizes(case)
        if isinstance(step.roles.batch, tirx.Var):
            sizes[step.roles.batch] = 1
        self.sizes = Evaluation(step.view, {}, sizes)
        self.seq = case.seq
        self.known: dict[relax.Var, Any] = {}
        for param in step.roles.of(IDS, step.inputs):
            self.known[param] = self._counted(param, 1)
        for param in step.inputs:
            if param in positions.values:
                self.known[param] = self._counted(param, self._token_axis(param))

    def _counted(self, var: relax.Var, axis: int) -> Labels:
        """Labels that count along an axis."""
        shape = self.sizes.shape(var)
        view = [1] * len(shape)
        view[axis] = self.seq
        return np.broadcast_to(np.arange(self.seq, dtype=np.int16).reshape(view), shape)

    def _token_axis(self, var: relax.Var) -> int:
        shape, seq = dims(var), self.step.roles.seq
        return next(axis for axis, size in enumerate(shape) if isinstance(size, tirx.Var) and size.same_as(seq))

    def bind(self, var: relax.Var) -> None:
        """Find the labels of a live variable from those of its operands."""
        if var in self.positions.values:
            self.known[var] = self._counted(var, self._token_axis(var))
        elif var in self.positions.rows:
            self.known[var] = self._counted(var, self.positions.rows[var])
        elif self.live.is_attention(var):
            self.known[var] = self._attention(var)
        elif var in self.live.settled:
            self.known[var] = self.known.get(self.live.settled[var])
        else:
            self.known[var] = self._value(self.step.view.values[var], var)

    def _attention(self, var: relax.Var) -> Labels:
        call = self.step.view.values[var]
        for operand in call.args[:3]:
            labels = self.known.get(operand)
            if labels is None or not np.array_equal(labels, self._counted(operand, 1)):
                raise _Mixed("its tokens are not along its second axis")
        return self._counted(var, 1)

    def _value(self, value: relax.Expr, var: relax.Var) -> Any:
        if isinstance(value, relax.TupleGetItem):
            labels = self.known.get(value.tuple_value)
            return None if labels is None else labels[value.index]
        if isinstance(value, relax.Tuple):
            return [self._labels(field) for field in value.fields]
        if isinstance(value, relax.Var):
            return self.known.get(value)
        if not isinstance(value, relax.Call):
            return None
        args = [self._labels(arg) for arg in value.args]
        if all(_is_empty(arg) for arg in args):
            return None
        return self._call(op_name(value), value, args, var)

    def _labels(self, arg: relax.Expr) -> Any:
        if isinstance(arg, relax.Var):
            return self.known.get(arg)
        return [self._labels(field) for field in arg.fields] if isinstance(arg, relax.Tuple) else None

    def _full(self, arg: relax.Expr, labels: Any) -> Labels:
        """Labels as an array, also where there are none."""
        return np.broadcast_to(np.int16(NONE), self.sizes.shape(arg)) if labels is None else labels

    def _call(self, name: str, call: relax.Call, args: list[Any], var: relax.Var) -> Any:
        if name in ELEMENTWISE:
            tensors = [self._full(arg, labels) for arg, labels in zip(call.args, args, strict=True)
                       if isinstance(arg.ty, relax.TensorType)]  # fmt: skip
            return _joined(np.broadcast_arrays(*tensors))
        if name == "take" and args[0] is None:
            return self._looked_up(call, args[1], var)
        if name in MOVING:
            return self._moved(name, call, args)
        if name == "matmul":
            return self._product(call, args, var)
        if name in REDUCTIONS:
            axes = axes_of(call.attrs)
            labels = _along(args[0], axes if axes is not None else tuple(range(args[0].ndim)))
            return np.broadcast_to(labels.reshape(self.sizes.shape(var)), self.sizes.shape(var))
        if name in ALONG_AXES:
            return self._along_axes(name, call, args, var)
        raise _Mixed(f"relax.{name} is not known to compute each token from itself")

    def _along_axes(self, name: str, call: relax.Call, args: list[Any], var: relax.Var) -> Any:
        axes = axes_of(call.attrs, ALONG_AXES[name])
        labels = _along(args[0], axes if axes is not None else tuple(range(args[0].ndim)))
        types = list(var.ty.fields) if isinstance(var.ty, relax.TupleType) else None
        if types is None:
            return np.broadcast_to(labels, self.sizes.shape(var))
        shape = list(args[0].shape)
        if name == "topk" and axes is not None:
            shape[axes[0]] = int(call.attrs.k)
        return [np.broadcast_to(labels, shape)] * len(types)

    def _looked_up(self, call: relax.Call, index: Labels, var: relax.Var) -> Labels:
        """Rows of a table that is of no token: of the token that the index is of."""
        table = self.sizes.shape(call.args[0])
        axis = int(call.attrs.axis) % len(table)
        view = index.reshape(*[1] * axis, *index.shape, *[1] * (len(table) - axis - 1))
        return np.broadcast_to(view, self.sizes.shape(var))

    def _moved(self, name: str, call: relax.Call, args: list[Any]) -> Any:
        """Labels move as the elements do; indices must be numbers."""
        first = call.args[0]
        if isinstance(first, relax.Tuple):
            parts = [self._full(arg, labels) for arg, labels in zip(first.fields, args[0], strict=True)]
            return MOVING[name](call.attrs, parts)
        if not all(_is_empty(labels) for labels in args[1:]):
            raise _Mixed("it chooses among tokens by what they hold")
        values = [self.sizes.value(arg) for arg in call.args[1:]]
        return MOVING[name](call.attrs, args[0], *values)

    def _product(self, call: relax.Call, args: list[Any], var: relax.Var) -> Labels:
        x, y = (self._full(arg, labels) for arg, labels in zip(call.args, args, strict=True))
        if x.ndim < 2 or y.ndim < 2:
            raise _Mixed("a product with a vector")
        left, right = _along(x, (-1,)), _along(y, (-2,))
        return _joined(np.broadcast_arrays(left, right))


def _is_empty(labels: Any) -> bool:
    """Whether no token has a part in a value."""
    return labels is None or (isinstance(labels, list) and all(_is_empty(part) for part in labels))


def _joined(parts: Sequence[Labels]) -> Labels:
    """The labels of elements computed from one of each part."""
    highest = parts[0]
    for part in parts[1:]:
        highest = np.maximum(highest, part)
    if any(((part != NONE) & (part != highest)).any() for part in parts):
        raise _Mixed("elements of different tokens meet")
    return highest


def _along(labels: Labels, axes: tuple[int, ...]) -> Labels:
    """The labels of elements computed from all along some axes, which stay with a length of 1."""
    highest: Labels = labels.max(axis=axes, keepdims=True)
    if ((labels != NONE) & (labels != highest)).any():
        raise _Mixed("it goes along an axis of tokens")
    return highest


