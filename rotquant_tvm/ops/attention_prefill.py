"""Prefill attention: the tokens of a chunk against the packed past and, in 16 bits or more, the chunk itself."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import Codec, TileLayout
from .axes import Axes
from .dequantize import TileReader
from .online_softmax import OnlineSoftmax
from .vector_code import f32, register

Expr = Any


def attention_prefill(
    codec_k: Codec,
    codec_v: Codec,
    heads: int,
    kv_heads: int,
    scale: float,
    dtype: str,
    axes: Axes,
    *,
    window: int | None = None,
) -> tvm.tirx.PrimFunc:
    """Build ``attention_prefill(q, k, v, cache, lengths, new_lengths, out)``.

    Shapes: q ``dtype`` [batch, seq, heads, head_dim] and k, v ``dtype`` [batch, kv_heads, seq, head_dim], all in the
    rotated bases; cache uint32 [batch, kv_heads, tiles, tile_bytes/4], whether or not it already holds the chunk;
    lengths int32 [batch] *with* the chunk, new_lengths int32 [batch] of it; out ``dtype`` [batch, seq, heads,
    head_dim] in the values' rotated basis, zero in rows that are no real token.
    """
    head_dim, group = codec_k.head_dim, heads // kv_heads
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    words = layout.tile_bytes // 4
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_prefill")
        T.func_attr({"rotquant.op": "attention_prefill", "tirx.noalias": True})
        q = T.arg("q", T.buffer((batch, seq, heads, head_dim), dtype))
        k, v = (T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for name in ("k", "v"))
        cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, words), "uint32"))
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, seq, heads, head_dim), dtype))
        with axes.blocks(batch * heads * seq) as block, T.sblock("row"):
            piece = T.axis.spatial(batch * heads * seq, block)
            T.reads(q[0:batch, 0:seq, 0:heads, 0:head_dim], cache[0:batch, 0:kv_heads, 0:tiles, 0:words])
            T.writes(out[0:batch, 0:seq, 0:heads, 0:head_dim])
            b, head = T.Bind(piece // (heads * seq)), T.Bind(piece // seq % heads)
            row = T.Bind((piece % seq).astype("int32"))
            past = T.Bind(lengths[b] - new_lengths[b])
            stored = T.Bind(tir.min(past, (tiles * 32).astype("int32")))
            zero = tir.const(0, "int32")
            oldest = register(tir.max(past + row - (window - 1), zero)) if window else zero
            state = OnlineSoftmax(axes, 1, head_dim)
            state.start(lambda _, dim: f32(q[b, row, head, dim]), scale)
            kv_head = head // group
            keys, values = (TileReader(cache, c, layout, r) for c, r in ((codec_k, "k"), (codec_v, "v")))
            # Loops that may be empty, not conditions: the compiler puts no barrier inside a condition.
            real = row < new_lengths[b]
            skipped = register(oldest // 32)
            count = register(tir.Select(real, tir.max((stored + 31) // 32 - skipped, zero), zero))
            with T.serial(0, count) as step:
                tile = skipped + step
                at = (b, kv_head, tile)
                state.tile(
                    lambda token, dim: keys.value(at, token, dim),
                    lambda token, dim: values.value(at, token, dim),
                    lambda token: tir.all(tile * 32 + token < stored, tile * 32 + token >= oldest),
                )
            skipped = register(tir.max(oldest - past, zero) // 32)
            count = register(tir.Select(real, row // 32 + 1 - skipped, zero))
            with T.serial(0, count) as step:
                base = (skipped + step) * 32
                state.tile(
                    lambda token, dim: f32(k[b, kv_head, base + token, dim]),
                    lambda token, dim: f32(v[b, kv_head, base + token, dim]),
                    lambda token: tir.all(base + token <= row, past + base + token >= oldest),
                )
            state.finish(lambda _, dim, value: T.buffer_store(out, value.astype(dtype), [b, row, head, dim]))
    return builder.get()
