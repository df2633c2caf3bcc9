"""Append to the 16-bit segments: new tokens enter the sinks and the ring, in place."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from .axes import Axes
from .vector_code import sanitize

Expr = Any


def append_plain(
    kv_heads: int, head_dim: int, words: int, dtype: str, policy: CachePolicy, axes: Axes
) -> tvm.tirx.PrimFunc:
    """Build ``append_plain(plain, k, v, packed, lengths, new_lengths, cache)``; ``plain`` is updated in place.

    Shapes: plain float16 [batch, kv_heads, 2, sinks + ring, head_dim]; k, v ``dtype`` [batch, kv_heads, seq,
    head_dim], rotated; packed int32 [batch], the tokens behind the sinks that are in tiles after this call's flush;
    lengths int32 [batch] with the new tokens, new_lengths int32 [batch] of them. Values are stored as 16-bit formats
    store them. ``cache`` uint32 [batch, kv_heads, tiles, words] is not read: it says that the flush, which reads the
    ring, comes first.
    """
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    slots, sinks = policy.slots, policy.sinks
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append_plain")
        T.func_attr({"rotquant.op": "append_plain", "tirx.noalias": True})
        plain = T.arg("plain", T.buffer((batch, kv_heads, 2, slots, head_dim), "float16"))
        new = [T.arg(n, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for n in ("k", "v")]
        packed, lengths, new_lengths = (
            T.arg(n, T.buffer((batch,), "int32")) for n in ("packed", "lengths", "new_lengths")
        )
        T.arg("cache", T.buffer((batch, kv_heads, tiles, words), "uint32"))
        with axes.blocks(batch * kv_heads * seq) as index, T.sblock("append_plain"):
            piece = T.axis.spatial(batch * kv_heads * seq, index)
            T.reads(*(x[0:batch, 0:kv_heads, 0:seq, 0:head_dim] for x in new))
            T.writes(plain[0:batch, 0:kv_heads, 0:2, 0:slots, 0:head_dim])
            b, head = T.Bind(piece // (kv_heads * seq)), T.Bind(piece // seq % kv_heads)
            row = T.Bind(piece % seq)
            place = T.Bind((lengths[b] - new_lengths[b]).astype("int64") + row)
            number = place - sinks
            kept = place < sinks
            slot = place
            if policy.ring:
                kept = tir.any(kept, number >= packed[b].astype("int64"))
                slot = tir.if_then_else(
                    place < sinks, place, tir.max(number, tir.const(0, "int64")) % policy.ring + sinks
                )
            kept = tir.all(kept, row < new_lengths[b].astype("int64"))
            for role in range(2):
                with axes.lanes(head_dim) as dim, T.If(kept), T.Then():
                    value = sanitize(new[role][b, head, row, dim]).astype("float16")
                    T.buffer_store(plain, value, [b, head, role, slot, dim])
    return builder.get()
