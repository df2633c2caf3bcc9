"""Following one axis of a tensor back through whatever keeps it, to see whether an operator lies in attention."""

from __future__ import annotations

from collections.abc import Iterator

from tvm import relax

from .axes import shape_of
from .dataflow import Dataflow

_ELEMENTWISE = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "where", "astype", "negative", "clip"),
    *("tanh", "exp", "sqrt", "square", "sigmoid", "nn.relu", "nn.leakyrelu", "nn.gelu", "nn.silu", "abs", "nn.dropout"),
}
_PRODUCTS = {"relax.matmul", "relax.einsum"}
_LOOKUPS = {"relax.take", "relax.gather_nd", "relax.gather_elements", "relax.index_tensor"}
_ONE = {"1", "T.int64(1)"}
_CUT = {"strided_slice", "dynamic_strided_slice", "split", "concat"}


def axis_sources(flow: Dataflow, expr: relax.Expr, axis: int) -> Iterator[tuple[relax.Expr, int]]:
    """Yield (tensor, axis) for all from which ``axis`` of ``expr`` comes, nearest first, ``expr`` itself included.

    Goes through elementwise operators, layouts and slices; stops behind anything else, which is still yielded.
    """
    queue, seen = [(flow.root(expr), axis)], set()
    while queue:
        expr, axis = queue.pop(0)
        if (expr, axis) in seen:
            continue
        seen.add((expr, axis))
        yield expr, axis
        queue += [(flow.root(source), place) for source, place in _before(flow, expr, axis)]


def _before(flow: Dataflow, expr: relax.Expr, axis: int) -> list[tuple[relax.Expr, int]]:
    value = flow.value(expr)
    if isinstance(value, relax.TupleGetItem):
        return [(value.tuple_value, axis)]
    call = flow.call(expr)
    if call is None:
        return []
    name = call.op.name.removeprefix("relax.")
    if name == "nn.dropout" or name in _CUT - {"concat"}:
        return [(call.args[0], axis)]
    if name == "concat":
        return [(field, axis) for field in flow.fields(call.args[0])]
    if name == "permute_dims":
        rank = expr.ty.ndim
        order = call.attrs.axes
        return [(call.args[0], rank - 1 - axis if order is None else int(order[axis]) % rank)]
    if name in ("reshape", "broadcast_to", "squeeze", "expand_dims"):
        return _same_from_end(call.args[0], expr, axis)
    if name not in _ELEMENTWISE:
        return []
    rank = expr.ty.ndim
    operands = [operand for operand in call.args[name == "where" :] if getattr(operand.ty, "ndim", 0)]
    return [(operand, place) for operand in operands if (place := axis - rank + operand.ty.ndim) >= 0]


def _same_from_end(source: relax.Expr, result: relax.Expr, axis: int) -> list[tuple[relax.Expr, int]]:
    """Keep an axis of the source if it and those behind it are as in the result, but for extents of 1."""
    source_shape, result_shape = shape_of(source), shape_of(result)
    if source_shape is None or result_shape is None:
        return [(source, axis)] if source.ty.ndim == result.ty.ndim else []
    before, after = ([str(size) for size in shape] for shape in (source_shape, result_shape))
    behind = [size for size in after[axis:] if size not in _ONE]
    for place in reversed(range(len(before))):
        if before[place] == after[axis] and [size for size in before[place:] if size not in _ONE] == behind:
            return [(source, place)]
    return []


def softmax_behind(flow: Dataflow, expr: relax.Expr, axis: int) -> relax.Var | None:
    """Return the softmax that an axis of some weights comes from, if it is normalized over that axis."""
    for source, place in axis_sources(flow, expr, axis):
        call = flow.call(source, "nn.softmax")
        if call is not None and int(call.attrs.axis) % source.ty.ndim == place:
            return source
    return None


def has_scores_behind(flow: Dataflow, expr: relax.Expr, axis: int) -> bool:
    """Whether an axis of a softmax's input comes from the keys of a product that is not a linear layer's."""
    for source, place in axis_sources(flow, expr, axis):
        call = flow.call(source, "matmul", "einsum")
        if call is not None:
            keys = _operand_of(flow, call, place, source.ty.ndim)
            return keys is not None and not is_weight(flow, keys)
    return False


def _operand_of(flow: Dataflow, call: relax.Call, axis: int, rank: int) -> relax.Expr | None:
    """Return the operand that an axis of a product comes from; None for a batch axis."""
    if call.op.name == "relax.matmul":
        return {rank - 1: call.args[1], rank - 2: call.args[0]}.get(axis)
    inputs, _, output = str(call.attrs.subscripts).replace(" ", "").partition("->")
    label = output[axis] if axis < len(output) else ""
    having = [field for field, term in zip(flow.fields(call.args[0]), inputs.split(","), strict=False) if label in term]
    return having[0] if label and len(having) == 1 else None


def is_weight(flow: Dataflow, expr: relax.Expr) -> bool:
    """Whether a tensor is a linear layer's: a matrix that no product has a part in."""
    root = flow.root(expr)
    return root.ty.ndim <= 2 and not is_computed(flow, root)


def is_computed(flow: Dataflow, expr: relax.Expr) -> bool:
    """Whether a product has a part in a tensor's values, so that it is no weight; not in where they were looked up."""
    queue, seen = [flow.root(expr)], set()
    while queue:
        value = flow.value(queue.pop())
        call = flow.call(value)
        if call is not None and call.op.name in _PRODUCTS:
            return True
        looked_up = call is not None and call.op.name in _LOOKUPS
        for used in relax.analysis.all_vars(call.args[0] if looked_up and call is not None else value):
            if used not in seen:
                seen.add(used)
                queue.append(used)
    return False
