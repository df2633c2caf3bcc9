"""From the input of a softmax back to the product of queries and keys: scale, soft-capping and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import relax

from .axes import Axes, AxisSpace
from .contraction import Contraction, contraction
from .dataflow import Dataflow
from .layouts import View, broadcast_axes, source_view
from .mismatch import Mismatch
from .uniform import uniform

MASKED = -1e3
"""A score set to this or less is masked: beside any visible score its weight is 0."""
LOWEST = -6e4
"""A lower bound of scores at this or less only replaces -inf (it is the least number of a float type)."""


@dataclass(frozen=True)
class Mask:
    """A tensor that masks scores: ``factor`` times it is added, or a score is hidden where it equals ``hidden``.

    ``fill`` is what hidden scores become: -inf, or a number far below all scores.
    """

    view: View
    factor: float = 1.0
    hidden: bool | None = None
    fill: float = -math.inf


@dataclass(frozen=True)
class Scores:
    """What lies between a softmax and ``product``: scores are ``cap * tanh(scale * product / cap)`` plus masks.

    ``cap`` is 0 for none; ``floor`` is a lower bound of the masked scores (None: none), ``views`` are all tensors
    passed.
    """

    product: Contraction
    scale: float
    cap: float
    masks: tuple[Mask, ...]
    floor: float | None
    views: tuple[View, ...]


@dataclass(frozen=True)
class _Passed:
    scale: float = 1.0
    cap: float = 0.0
    masks: tuple[Mask, ...] = ()
    floor: float | None = None
    views: tuple[View, ...] = ()


def read_scores(flow: Dataflow, space: AxisSpace, view: View, keys_axis: int) -> Scores:
    """Read the input of a softmax over its axis ``keys_axis``; raises Mismatch where it is not as said above."""
    return _Reader(flow, space, flow.root(view[0]), keys_axis).read(view, _Passed())


class _Reader:
    def __init__(self, flow: Dataflow, space: AxisSpace, top: relax.Expr, keys_axis: int) -> None:
        self.flow, self.space = flow, space
        self.top, self.keys_axis = top, keys_axis

    def read(self, view: View, passed: _Passed) -> Scores:
        expr, axes = view
        passed = replace(passed, views=(*passed.views, view))
        product = contraction(self.flow, self.space, view)
        if product is not None:
            return Scores(product, passed.scale, passed.cap, passed.masks, passed.floor, passed.views)
        source = source_view(self.flow, self.space, view)
        if source is not None:
            return self.read(source, passed)
        call = self.flow.call(expr)
        name = self.flow.operator(expr).removeprefix("relax.")
        step: Callable[..., Scores] | None = getattr(self, f"_{name}", None) if call is not None else None
        if step is None:
            raise self._mismatch(expr, _REASONS.get(name, "scores are computed by it"), passed)
        return step(call, axes, passed)

    def _mismatch(self, expr: relax.Expr, reason: str, passed: _Passed) -> Mismatch:
        return Mismatch(self.flow.operator(expr), reason, len(passed.views))

    def _operand(self, expr: relax.Expr, axes: Axes, passed: _Passed) -> Scores:
        return self.read((expr, broadcast_axes(expr, axes)), passed)

    def _astype(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        if self.flow.float_cast(call) is None:
            raise self._mismatch(call, "scores are cast to or from integers", passed)
        return self._operand(call.args[0], axes, passed)

    def _negative(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        return self._operand(call.args[0], axes, replace(passed, scale=-passed.scale))

    def _multiply(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        for factor, rest in (call.args, list(call.args)[::-1]):
            value = uniform(self.flow, factor)
            if value is not None:
                return self._scaled(call, rest, value, axes, passed)
        raise self._mismatch(call, "scores are multiplied by what is no constant", passed)

    def _divide(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        value = uniform(self.flow, call.args[1])
        if not value:
            raise self._mismatch(call, "scores are divided by what is no constant", passed)
        return self._scaled(call, call.args[0], 1 / value, axes, passed)

    def _scaled(self, call: relax.Call, rest: relax.Expr, by: float, axes: Axes, passed: _Passed) -> Scores:
        if not by or not math.isfinite(by):
            raise self._mismatch(call, f"scores are scaled by {by}", passed)
        return self._operand(rest, axes, replace(passed, scale=passed.scale * by))

    def _tanh(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        if passed.cap:
            raise self._mismatch(call, "scores are capped twice", passed)
        return self._operand(call.args[0], axes, replace(passed, cap=abs(passed.scale)))

    def _maximum(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        for bound, rest in (call.args, list(call.args)[::-1]):
            value = uniform(self.flow, bound)
            if value is not None:
                return self._bounded(call, rest, value, axes, passed)
        raise self._mismatch(call, "scores have a lower bound that is no constant", passed)

    def _clip(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        low, high = (float(bound.value) if hasattr(bound, "value") else math.nan for bound in call.args[1:3])
        if not high >= -LOWEST:
            raise self._mismatch(call, f"scores are clipped to at most {high}", passed)
        return self._bounded(call, call.args[0], low, axes, passed)

    def _bounded(self, call: relax.Call, rest: relax.Expr, low: float, axes: Axes, passed: _Passed) -> Scores:
        if not low <= LOWEST or passed.masks or passed.cap or passed.floor is not None or passed.scale <= 0:
            raise self._mismatch(call, f"scores have the lower bound {low}", passed)
        floor = low * passed.scale if math.isfinite(low) else None
        return self._operand(rest, axes, replace(passed, floor=floor))

    def _where(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        condition, *branches = call.args
        for fill, rest, hidden in ((branches[1], branches[0], False), (branches[0], branches[1], True)):
            value = uniform(self.flow, fill)
            if value is None:
                continue
            if value * passed.scale > MASKED:
                raise self._mismatch(call, f"scores are replaced by {value:g}, which does not hide them", passed)
            mask = Mask((condition, broadcast_axes(condition, axes)), 1.0, hidden, value)
            return self._operand(rest, axes, self._masked(call, mask, passed))
        raise self._mismatch(call, "scores are replaced by what is no constant", passed)

    def _masked(self, call: relax.Call, mask: Mask, passed: _Passed) -> _Passed:
        if passed.cap:
            raise self._mismatch(call, "scores are masked before they are capped", passed)
        return replace(passed, masks=(*passed.masks, mask))

    def _subtract(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        left, right = call.args
        if self._is_largest(right, left):
            return self._operand(left, axes, passed)
        return self._added(call, left, right, -1.0, axes, passed)

    def _is_largest(self, expr: relax.Expr, of: relax.Expr) -> bool:
        """Whether ``expr`` is the row's largest score, which a softmax may have subtracted from its input."""
        call = self.flow.call(expr, "max")
        if call is None or not call.attrs.keepdims or not self.flow.root(call.args[0]).same_as(self.flow.root(of)):
            return False
        rank = of.ty.ndim
        return [int(axis) % rank for axis in call.attrs.axis or []] == [self.keys_axis]

    def _add(self, call: relax.Call, axes: Axes, passed: _Passed) -> Scores:
        found, missed = [], []
        for rest, added in (call.args, list(call.args)[::-1]):
            try:
                found.append(self._added(call, rest, added, 1.0, axes, passed))
            except Mismatch as mismatch:
                missed.append(mismatch)
        if len(found) == 2:
            raise self._mismatch(call, "scores are a sum of two products", passed)
        if not found:
            raise max(missed, key=lambda mismatch: mismatch.depth)
        return found[0]

    def _added(
        self, call: relax.Call, rest: relax.Expr, added: relax.Expr, sign: float, axes: Axes, passed: _Passed
    ) -> Scores:
        value = uniform(self.flow, added)
        if value is not None and math.isfinite(value) and not passed.cap:
            return self._operand(rest, axes, passed)  # a softmax does not see what all its inputs have in common
        mask = Mask((added, broadcast_axes(added, axes)), sign * passed.scale)
        return self._operand(rest, axes, self._masked(call, mask, passed))


_REASONS = {
    "concat": "a column that is no key joins the scores (attention sinks)",
    "nn.relu": "scores go through a relu",
    "sigmoid": "scores go through a sigmoid",
    "strided_slice": "a part of the scores is taken",
}
