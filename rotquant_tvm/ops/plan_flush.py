"""Plan a flush: how many of each sequence's tokens leave the 16-bit ring for packed tiles."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from .axes import Axes


def plan_flush(policy: CachePolicy, axes: Axes, *, chunk: bool) -> tvm.tirx.PrimFunc:
    """Build ``plan_flush(packed, lengths, before)``.

    Shapes, all int32 [batch]: packed, the tokens behind the sinks that are in tiles, updated in place; lengths, with
    the call's new tokens; before, which receives the old ``packed``. Whole blocks leave, as many as keep ``recent``
    tokens in 16 bits; with a deferring policy a prefill (``chunk``) only moves out what has no slot.
    """
    batch = tir.Var("batch", "int64")
    zero, block = tir.const(0, "int32"), policy.block
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("plan_flush")
        T.func_attr({"rotquant.op": "plan_flush", "tirx.noalias": True})
        packed = T.arg("packed", T.buffer((batch,), "int32"))
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        before = T.arg("before", T.buffer((batch,), "int32"))
        outer = T.thread_binding(0, batch, "blockIdx.x") if axes.kind == "cuda" else T.serial(0, batch)
        with outer as index, T.sblock("sequence"):
            b = T.axis.spatial(batch, index)
            T.reads(packed[b], lengths[b])
            T.writes(packed[b], before[b])
            with axes.lanes(1) as _:
                old = T.alloc_buffer((1,), "int32", scope="local")
                T.buffer_store(old, packed[b], [0])
                if chunk and policy.defer:
                    surplus = lengths[b] - (policy.sinks + policy.ring)
                    wanted = (tir.max(surplus, zero) + (block - 1)) // block * block
                else:
                    wanted = tir.max(lengths[b] - (policy.sinks + policy.recent), zero) // block * block
                T.buffer_store(before, old[0], [b])
                T.buffer_store(packed, tir.max(old[0], wanted), [b])
    return builder.get()
