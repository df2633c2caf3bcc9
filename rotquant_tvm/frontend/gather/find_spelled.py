"""All attention of a function that is spelled out, and all that only comes near it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import relax

from .axes import AxisSpace
from .contraction import Contraction
from .dataflow import Dataflow
from .extents import ExtentTable
from .mismatch import Mismatch
from .near_miss import NearMiss
from .neighbourhood import has_scores_behind, is_weight, softmax_behind
from .other_attention import attention_without_softmax
from .spelled_attention import SpelledAttention, match_attention, match_weights, output_product
from .weights import Weights


@dataclass
class Findings:
    """Attention to gather, and near misses, each in the order of the bindings."""

    found: list[SpelledAttention] = field(default_factory=list)
    missed: list[NearMiss] = field(default_factory=list)


def find_spelled(flow: Dataflow) -> Findings:
    """Try every product as weights times values, with either operand as the weights."""
    findings, table = Findings(), ExtentTable()
    for binding in flow.bindings:
        if not flow.root(binding.var).same_as(binding.var):
            continue  # another name of a product that is tried itself
        tried = _try(flow, table, binding.var)
        if isinstance(tried, SpelledAttention):
            findings.found.append(tried)
        elif isinstance(tried, NearMiss) and not any(miss.variable.same_as(tried.variable) for miss in findings.missed):
            findings.missed.append(tried)
    return findings


def _try(flow: Dataflow, table: ExtentTable, var: relax.Var) -> SpelledAttention | NearMiss | None:
    missed: NearMiss | None = None
    for exchanged in (False, True):
        product = output_product(flow, table, var)
        if product is None:
            return _shapeless(flow, var)
        space, output = product
        output = output.swapped() if exchanged else output
        tried: SpelledAttention | NearMiss | None
        try:
            weights = match_weights(flow, space, output)
        except Mismatch as mismatch:
            tried = _near(flow, output, mismatch)
        else:
            tried = _attention(flow, space, output, weights)
        if isinstance(tried, SpelledAttention):
            return tried
        missed = missed or tried
    return missed or attention_without_softmax(flow, var)


def _shapeless(flow: Dataflow, var: relax.Var) -> NearMiss | None:
    """Return a near miss if a product of unknown shape sums over a softmax's axis."""
    call = flow.call(var, "matmul")
    for operand, behind in zip(call.args, (1, 2), strict=True) if call is not None else ():
        axis = operand.ty.ndim - behind
        softmax = softmax_behind(flow, operand, axis) if axis >= 0 else None
        scores = flow.call(softmax) if softmax is not None else None
        if softmax is not None and scores is not None and has_scores_behind(flow, scores.args[0], axis):
            return NearMiss(softmax, "relax.matmul", "the shape of weights times values is unknown")
    return None


def _attention(
    flow: Dataflow, space: AxisSpace, output: Contraction, weights: Weights
) -> SpelledAttention | NearMiss | None:
    """Return the attention or the near miss behind a softmax; None behind that of a linear layer."""
    try:
        attention = match_attention(flow, space, output, weights)
    except Mismatch as mismatch:
        near = has_scores_behind(flow, weights.scores[0], weights.keys_axis)
        return NearMiss(weights.softmax, mismatch.operator, mismatch.reason) if near else None
    return None if is_weight(flow, attention.keys[-1].expr) else attention


def _near(flow: Dataflow, output: Contraction, mismatch: Mismatch) -> NearMiss | None:
    """Return a near miss if there is a softmax between two products in spite of the mismatch."""
    weights, axes = output.left
    places = [place for place, axis in enumerate(axes) if axis == output.contracted and axis]
    softmax = softmax_behind(flow, weights, places[0]) if places else None
    call = flow.call(softmax) if softmax is not None else None
    if softmax is None or call is None:
        return None
    if not has_scores_behind(flow, call.args[0], int(call.attrs.axis) % softmax.ty.ndim):
        return None
    return NearMiss(softmax, mismatch.operator, mismatch.reason)
