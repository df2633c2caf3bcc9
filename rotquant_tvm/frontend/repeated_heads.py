"""Keys and values without the copies that some sources make of each head for the queries that share it."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.gather.axes import Axes, AxisSpace, shape_of
from rotquant_tvm.frontend.gather.dataflow import Dataflow
from rotquant_tvm.frontend.gather.emit import Emitter
from rotquant_tvm.frontend.gather.extents import ExtentTable
from rotquant_tvm.frontend.gather.layouts import View, source_view

_ATTENTION = ("nn.attention", "nn.attention_bias")
_SWAP = [0, 2, 1, 3]


def without_repeated_heads(mod: tvm.IRModule) -> tvm.IRModule:
    """Give every ``nn.attention*`` of the function "main" the keys and values as they were before heads were repeated.

    Repetitions are found in any spelling (``repeat``, or added axes, ``broadcast_to`` and a reshape, in any layout).
    A head must be repeated for neighbouring query heads, as often in the keys as in the values; otherwise, and where
    nothing is repeated, a call stays as it is.
    """
    flow = Dataflow(mod["main"])
    changed: dict[relax.Var, list[relax.Binding]] = {}
    for binding in flow.bindings:
        call = flow.call(binding.value, *_ATTENTION) if isinstance(binding.value, relax.Call) else None
        if call is not None and (bindings := _ungrouped(flow, binding.var, call)) is not None:
            changed[binding.var] = bindings
    if not changed:
        return mod
    function = flow.function
    blocks = [
        type(block)([new for old in block.bindings for new in changed.get(old.var, [old])])
        for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    result["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return relax.transform.DeadCodeElimination(["main"])(result)


def _ungrouped(flow: Dataflow, var: relax.Var, call: relax.Call) -> list[relax.Binding] | None:
    """Bind an attention to a call on the heads before they were repeated; None if none were."""
    emitter = Emitter(isinstance(var, relax.DataflowVar))
    found = [_source(flow, operand) for operand in call.args[1:3]]
    sources = [source for source in found if source is not None]
    if len(sources) != len(found) or len({source[3] for source in sources}) != 1 or sources[0][3] == 1:
        return None
    heads = []
    for space, view, wanted, _ in sources:
        heads.append(emitter.emit(R.permute_dims(emitter.layout(space, *view, wanted), _SWAP)))
    emitter.bind(var, relax.Call(call.op, [call.args[0], *heads, *call.args[3:]], call.attrs, call.ty_args))
    return emitter.bindings


def _source(flow: Dataflow, operand: relax.Expr) -> tuple[AxisSpace, View, Axes, int] | None:
    """Return what keys or values [batch, length, heads, head_dim] are a layout of, and how often heads are repeated.

    With it the layout [batch, kv_heads, length, head_dim] that is wanted. None if something else is repeated.
    """
    shape = shape_of(operand)
    if shape is None:
        return None
    space = AxisSpace(ExtentTable())
    batch, length, heads, head_dim = space.axes(shape)
    views: list[View] = [(operand, (batch, length, heads, head_dim))]
    while (above := source_view(flow, space, views[-1])) is not None:
        views.append(above)
    present = set(space.atoms(views[-1][1]))
    kept = tuple(atom for atom in space.resolve(heads) if atom in present)
    repeated = space.resolve(heads)[len(kept) :]
    if any(atom in present for atom in repeated) or not present >= set(space.atoms((batch, length, head_dim))):
        return None
    copies = space.size(repeated)
    wanted = tuple(map(space.resolve, (batch, kept, length, head_dim)))
    unrepeated = [view for view in views if not set(repeated) & set(space.atoms(view[1]))]
    fitting = [view for view in unrepeated if tuple(map(space.resolve, view[1])) == wanted]
    count = int(copies) if isinstance(copies, (int, tvm.tirx.IntImm)) else 0
    return (space, (fitting or unrepeated)[-1], wanted, count) if count else None
