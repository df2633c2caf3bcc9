"""Gathering attention that is spelled out into ``R.nn.attention`` and ``R.nn.attention_bias``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.step_graph import SOFTCAPS

from .dataflow import FLOATS, Dataflow, dtype_of
from .emit import Emitter
from .find_spelled import Findings, find_spelled
from .masks import emit_mask, lowest, never_empty
from .near_miss import NearMiss
from .operands import Stage, topmost
from .spelled_attention import SpelledAttention

_ATTENTION = ("relax.nn.attention", "relax.nn.attention_bias")
_SWAP = [0, 2, 1, 3]


def near_misses(mod: tvm.IRModule) -> list[NearMiss]:
    """Return what comes near attention in the function "main" and is not gathered, in the order of the bindings."""
    return _findings(mod)[1].missed


def gather_attention(mod: tvm.IRModule, *, guard_rows: bool = True) -> tvm.IRModule:
    """Replace attention that is spelled out in the function "main" by ``R.nn.attention`` or ``R.nn.attention_bias``.

    Products, softmax and all between them become one call with operands [batch, seq, heads, head_dim], each made by
    ``permute_dims([0, 2, 1, 3])`` of [batch, heads, seq, head_dim]; keys and values keep their own number of heads,
    the scale is one number, masks are one additive operand [batch or 1, 1, seq or 1, keys], and soft-capping is in
    the attribute ``rotquant.softcaps``. Rows in which a guarded softmax sees no key give 0, as before, by a ``where``
    behind the call; without ``guard_rows`` they are left undefined, for callers to whom all rows that matter see a
    key. What is not recognized stays (``near_misses``). Returns ``mod`` itself if there is nothing to gather; raises
    TVM's own error if the result is not well formed.
    """
    flow, findings = _findings(mod)
    if not findings.found:
        return mod
    rewritten = {attention.output: attention for attention in findings.found}
    old_caps = _softcaps(flow.function)
    blocks: list[relax.BindingBlock] = []
    caps: list[float] = []
    for block in flow.function.body.blocks:
        dataflow = isinstance(block, relax.DataflowBlock)
        bindings: list[relax.Binding] = []
        for binding in block.bindings:
            if binding.var in rewritten:
                attention = rewritten[binding.var]
                bindings += _gathered(flow, attention, dataflow, guard_rows)
                caps.append(attention.cap)
            else:
                bindings.append(binding)
                if getattr(getattr(binding.value, "op", None), "name", "") in _ATTENTION:
                    caps.append(next(old_caps, 0.0))
        blocks.append(relax.DataflowBlock(bindings) if dataflow else relax.BindingBlock(bindings))
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    result["main"] = _with_blocks(flow.function, blocks, caps)
    result = relax.transform.DeadCodeElimination()(result)
    relax.analysis.well_formed(result)
    return result


def _findings(mod: tvm.IRModule) -> tuple[Dataflow, Findings]:
    """Analyse "main" without its dead code, whose readers do not count."""
    flow = Dataflow(relax.transform.DeadCodeElimination()(mod)["main"])
    return flow, find_spelled(flow)


def _softcaps(function: relax.Function) -> Iterator[float]:
    attrs = function.attrs or {}
    return iter([float(cap) for cap in attrs[SOFTCAPS]] if SOFTCAPS in attrs else [])


def _with_blocks(function: relax.Function, blocks: list[relax.BindingBlock], caps: list[float]) -> relax.Function:
    body = relax.SeqExpr(blocks, function.body.body)
    result = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return result.with_attr(SOFTCAPS, caps) if any(caps) else result


def _gathered(
    flow: Dataflow, attention: SpelledAttention, dataflow: bool, guard_rows: bool
) -> list[relax.Binding]:
    """Bind the attention's output to a call on its operands."""
    emitter, space, roles = Emitter(dataflow), attention.space, attention.roles
    operands = (attention.queries, attention.keys, attention.values)
    layouts = (roles.query_layout, roles.key_layout, roles.value_layout)
    dtype = _dtype(flow, attention)
    scale, tensors = attention.scale, []
    for stages, layout in zip(operands, layouts, strict=True):
        stage = topmost(space, stages, tuple(map(space.resolve, layout)), dtype, unscaled=stages is attention.queries)
        scale *= stage.factor
        tensor = emitter.layout(space, stage.expr, stage.axes, layout)
        if stage.dtype != dtype:
            tensor = emitter.emit(R.astype(tensor, dtype))
        tensors.append(emitter.emit(R.permute_dims(tensor, _SWAP)))
    mask = _mask(emitter, attention, dtype)
    if mask is None:
        result = emitter.emit(R.nn.attention(*tensors, scale=scale))
    else:
        result = emitter.emit(R.nn.attention_bias(*tensors, _as_bias(emitter, attention, mask, dtype), scale=scale))
    result = emitter.emit(R.permute_dims(result, _SWAP))
    if mask is not None and guard_rows and _can_be_empty(flow, attention):
        result = _guarded(emitter, mask, result, dtype)
    wanted = dtype_of(attention.output)
    if dtype != wanted:
        result = emitter.emit(R.astype(result, wanted))
    emitter.bind(attention.output, emitter.layout(space, result, roles.output_layout, attention.output_axes))
    return emitter.bindings


def _dtype(flow: Dataflow, attention: SpelledAttention) -> str:
    """Return the dtype of the attention: a narrow one if operands are only widened for it and the result narrowed."""
    operands = (attention.queries, attention.keys, attention.values)
    readers = [flow.call(reader, "astype") for reader in flow.graph.successors(attention.output)]
    narrowed = {dtype_of(reader) if reader is not None else "" for reader in readers}
    candidates = [*(narrowed if len(narrowed) == 1 and narrowed <= FLOATS.keys() else []), dtype_of(attention.output)]
    for dtype in candidates:
        if all(any(stage.dtype == dtype for stage in stages) for stages in operands):
            return dtype
    sources: list[Stage] = [stages[-1] for stages in operands]
    return max((stage.dtype for stage in sources), key=lambda dtype: FLOATS[dtype])


def _mask(emitter: Emitter, attention: SpelledAttention, dtype: str) -> relax.Expr | None:
    """Emit the sum of the masks in the widest of their dtypes and ``dtype``."""
    if not attention.masks:
        return None
    own = [dtype_of(mask.view[0]) for mask in attention.masks if mask.hidden is None]
    wide = max([dtype, *(name for name in own if name in FLOATS)], key=lambda name: FLOATS[name])
    layout = attention.roles.mask_layout
    total: relax.Expr | None = None
    for mask in reversed(attention.masks):
        operand = emit_mask(emitter, attention.space, mask, layout, wide)
        total = operand if total is None else emitter.emit(R.add(total, operand))
    if attention.floor is not None:
        total = emitter.emit(R.maximum(total, relax.const(max(attention.floor, lowest(wide)), wide)))
    return total


def _as_bias(emitter: Emitter, attention: SpelledAttention, mask: relax.Expr, dtype: str) -> relax.Expr:
    """Return a mask in the dtype of the attention; what would overflow there becomes its least number."""
    if dtype_of(mask) == dtype:
        return mask
    bounded = emitter.emit(R.maximum(mask, relax.const(lowest(dtype), dtype_of(mask))))
    return emitter.emit(R.astype(bounded, dtype))


def _can_be_empty(flow: Dataflow, attention: SpelledAttention) -> bool:
    """Whether a guarded softmax may meet a row without a key."""
    if not attention.guarded or attention.floor is not None:
        return False
    return not never_empty(flow, attention.space, attention.masks, attention.roles.keys)


def _guarded(emitter: Emitter, mask: relax.Expr, result: relax.Expr, dtype: str) -> relax.Expr:
    """Set the result [batch, heads, seq, head_dim] to 0 in rows whose mask is -inf throughout.

    A maximum of the mask itself would not do: TVM's starts from the least finite number.
    """
    visible = emitter.emit(R.not_equal(mask, relax.const(-math.inf, dtype_of(mask))))
    any_visible = emitter.emit(R.max(emitter.emit(R.astype(visible, "int8")), axis=[3], keepdims=True))
    empty = emitter.emit(R.equal(any_visible, relax.const(0, "int8")))
    return emitter.emit(R.where(empty, relax.const(0.0, dtype), result))
