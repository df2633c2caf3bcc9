"""Dequantize a cache with a policy: all stored keys and values in token order, still in the rotated basis."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from ..formats import TOKENS, Codec, TileLayout
from .axes import Axes
from .segments import Segments, segment_arguments
from .vector_code import f32, register


def dequantize_segments(
    codec_k: Codec, codec_v: Codec, kv_heads: int, policy: CachePolicy, axes: Axes, *, wraps: bool = False
) -> tvm.tirx.PrimFunc:
    """Build ``dequantize_segments(cache[, centre], plain, packed, lengths, k, v)``.

    Shapes: the cache's as ``segment_arguments`` says; lengths int32 [batch]; outputs k, v float32
    [batch, kv_heads, sinks + 32*tiles + ring, head_dim], by position, zero from ``lengths`` on. ``wraps``: the tiles
    are a ring (``window_ring``), and so are the rows behind the sinks; they hold the newest tokens.
    """
    head_dim, sinks = codec_k.head_dim, policy.sinks
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")
    longest = tiles * TOKENS + (sinks + policy.ring)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dequantize_segments")
        T.func_attr({"rotquant.op": "dequantize_segments", "tirx.noalias": True})
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        outputs = [T.arg(n, T.buffer((batch, kv_heads, longest, head_dim), "float32")) for n in ("k", "v")]
        segments = Segments(arrays, (codec_k, codec_v), layout, policy, wraps)
        with axes.blocks(batch * kv_heads * longest) as block, T.sblock("dequantize"):
            piece = T.axis.spatial(batch * kv_heads * longest, block)
            T.reads(arrays[0][0:batch, 0:kv_heads, 0:tiles, 0 : layout.tile_bytes // 4], lengths[0:batch])
            T.writes(*(out[0:batch, 0:kv_heads, 0:longest, 0:head_dim] for out in outputs))
            b, head = T.Bind(piece // (kv_heads * longest)), T.Bind(piece // longest % kv_heads)
            row = T.Bind((piece % longest).astype("int32"))
            packed = T.Bind(segments.packed(b, lengths[b]))
            place = row
            if wraps:  # the newest of the tokens that the row is for; with none it counts as one past the end
                turns = (longest - sinks).astype("int32")
                newest = register(lengths[b] - 1 - tir.floormod(lengths[b] - 1 - row, turns))
                place = register(tir.Select(row < sinks, row, tir.Select(newest < sinks, lengths[b], newest)))
            number = T.Bind(tir.max(place - sinks, tir.const(0, "int32")))
            in_tile = T.Bind(tir.all(place >= sinks, number < packed))
            for role, out in enumerate(outputs):
                with axes.lanes(head_dim) as dim:
                    tile = tir.min(number // TOKENS, (tiles - 1).astype("int32"))
                    if wraps:
                        tile = number // TOKENS % tiles.astype("int32")
                    stored = segments.tile_element(role, (b, head, tile), number % TOKENS, dim)
                    slot = tir.if_then_else(place < sinks, place, segments.slot(number))
                    kept = f32(segments.plain[b, head, role, slot, dim])
                    value = tir.if_then_else(in_tile, stored, kept)
                    T.buffer_store(out, tir.if_then_else(place < lengths[b], value, f32(0)), [b, head, row, dim])
    return builder.get()
