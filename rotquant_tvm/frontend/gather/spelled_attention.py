"""One attention that is spelled out: matching the dataflow around a product with values."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from tvm import relax

from .axes import Axes, Axis, AxisSpace
from .contraction import Contraction, contraction
from .dataflow import FLOATS, Dataflow, dtype_of
from .extents import ExtentTable
from .likely_shape import likely_shape
from .masks import mask_source, varies
from .mismatch import Mismatch
from .operands import Stage, read_operand
from .roles import Roles, Sources, find_roles
from .scores import Mask, Scores, read_scores
from .weights import Weights, read_weights


@dataclass(frozen=True)
class SpelledAttention:
    """An attention whose result is the variable ``output`` with ``output_axes``.

    ``queries``, ``keys`` and ``values`` are the stages of the operands; scores are ``scale`` times the product of the
    first stages of queries and keys. ``cap`` is 0 for none, ``floor`` a lower bound of masked scores. ``guarded``: rows
    in which all is masked give 0.
    """

    space: AxisSpace
    roles: Roles
    softmax: relax.Var
    output: relax.Var
    output_axes: Axes
    queries: list[Stage]
    keys: list[Stage]
    values: list[Stage]
    scale: float
    cap: float
    masks: tuple[Mask, ...]
    floor: float | None
    guarded: bool


def output_product(flow: Dataflow, table: ExtentTable, var: relax.Var) -> tuple[AxisSpace, Contraction] | None:
    """Return a product of known shape over axes of its own, which may be weights times values."""
    shape = likely_shape(flow, var) if flow.call(var, "matmul", "einsum") is not None else None
    if shape is None:
        return None
    space = AxisSpace(table)
    product = contraction(flow, space, (var, space.axes(shape)))
    return None if product is None else (space, product)


def match_weights(flow: Dataflow, space: AxisSpace, output: Contraction) -> Weights:
    """Follow the left operand of ``output`` to a softmax over the contracted axis; raises Mismatch."""
    weights = read_weights(flow, space, output.left)
    normalized = space.resolve(weights.scores[1][weights.keys_axis])
    if not normalized or normalized != space.resolve(output.contracted):
        raise Mismatch("relax.nn.softmax", "the softmax is not over the axis that the product with values sums over")
    return weights


def match_attention(flow: Dataflow, space: AxisSpace, output: Contraction, weights: Weights) -> SpelledAttention:
    """Match what lies before the softmax; raises Mismatch with the operator that broke the match."""
    scores = read_scores(flow, space, weights.scores, weights.keys_axis)
    keys_atoms = set(space.resolve(weights.scores[1][weights.keys_axis]))
    product = scores.product
    if keys_atoms & set(space.atoms(product.left[1])):
        product = product.swapped()
    queries, keys = (read_operand(flow, space, view, True) for view in (product.left, product.right))
    values = read_operand(flow, space, output.right, False)
    masks = tuple(mask_source(flow, space, mask) for mask in scores.masks)
    sources = _sources(space, output, weights, scores, product, (queries, keys, values), masks)
    roles = find_roles(space, sources)
    for mask in masks:
        if varies(flow, space, mask.view, roles.heads):
            raise Mismatch(
                flow.operator(mask.view[0]),
                "what is added to scores differs by head (alibi or a relative position bias): it is no mask",
            )
    _check_dtypes(queries, keys, values)
    _check_readers(flow, scores.product.result[0], output.result[0])
    return SpelledAttention(
        space,
        roles,
        weights.softmax,
        output.result[0],
        tuple(map(space.resolve, output.result[1])),
        queries,
        keys,
        values,
        scores.scale,
        scores.cap,
        masks,
        scores.floor,
        weights.guarded,
    )


def _sources(
    space: AxisSpace,
    output: Contraction,
    weights: Weights,
    scores: Scores,
    product: Contraction,
    operands: tuple[list[Stage], list[Stage], list[Stage]],
    masks: tuple[Mask, ...],
) -> Sources:
    """Gather the atoms of all that was matched; only now, since reading an operand may have split them."""
    queries, keys, values = (space.atoms(stages[-1].axes) for stages in operands)

    def first(axis: Axis) -> Axis:
        return space.resolve(axis)

    return Sources(
        queries=queries,
        keys=keys,
        values=values,
        scores=space.atoms(product.result[1]),
        rows=first(product.left_rows),
        softmax_axis=first(weights.scores[1][weights.keys_axis]),
        contracted=first(product.contracted),
        result=tuple(map(space.resolve, output.result[1])),
        masks=tuple(atom for mask in masks for atom in space.atoms(mask.view[1])),
        views=(*weights.views, *scores.views),
        operand_views=tuple((stage.expr, stage.axes) for stages in operands for stage in stages),
    )


def _check_dtypes(*operands: list[Stage]) -> None:
    for stages in operands:
        if stages[0].dtype not in FLOATS:
            raise Mismatch("relax.matmul", f"its operands are {stages[0].dtype or 'of unknown dtype'}")


def _check_readers(flow: Dataflow, product: relax.Expr, output: relax.Expr) -> None:
    """Scores and weights must serve the attention alone: elsewhere they would have to be computed still."""
    first, last = flow.root(product), flow.root(output)
    between = {first} | (nx.descendants(flow.graph, first) & nx.ancestors(flow.graph, last))
    result = flow.function.body.body
    for var in between:
        for reader in flow.graph.successors(var):
            if reader not in between and not reader.same_as(last):
                raise Mismatch(flow.operator(reader), f"scores or weights have another reader, {reader.name}")
        if var.same_as(result):
            raise Mismatch(dtype_of(var) and flow.operator(var), "the function returns scores or weights")
