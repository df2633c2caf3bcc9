"""Append: rotate, quantize and pack new keys and values into the tiles of a cache, in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import Codec, TileLayout
from .axes import Axes
from .tile_writer import TileWriter
from .vector_code import EncodeBuffers, emit_encode, register

Expr = Any


def append(
    codec_k: Codec, codec_v: Codec, kv_heads: int, dtype: str, axes: Axes, *, wraps: bool = False, after: int = 0
) -> tvm.tirx.PrimFunc:
    """Build ``append(cache, k, v, rotation_k, rotation_v, lengths, new_lengths[, seen])``; updates ``cache`` in place.

    Shapes: cache uint32 [batch, kv_heads, tiles, tile_bytes/4]; k, v ``dtype`` [batch, kv_heads, seq, head_dim], raw;
    rotations float32 (``Codec.coefficients``); lengths int32 [batch], *after* the append; new_lengths int32 [batch],
    how many of the ``seq`` tokens are real. Tokens past the capacity are dropped (sessions refuse them before).
    ``wraps``: the tiles are a ring (``window_ring``); of the new tokens those in its last tiles are written. ``after``
    heads: ``seen``, the output ``dtype`` [batch, seq, after, head_dim] of the attention that must have read the cache
    before; it is not read.
    """
    head_dim = codec_k.head_dim
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    rotation_sizes = [codec.coefficients.size for codec in (codec_k, codec_v)]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append")
        T.func_attr({"rotquant.op": "append", "tirx.noalias": True})
        cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, layout.tile_bytes // 4), "uint32"))
        source = [T.arg(n, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for n in ("k", "v")]
        sizes = zip("kv", rotation_sizes, strict=True)
        rotations = [T.arg(f"rotation_{n}", T.buffer((size,), "float32")) for n, size in sizes]
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        if after:
            T.arg("seen", T.buffer((batch, seq, after, head_dim), dtype))
        touched = (seq + 62) // 32
        with axes.blocks(batch * kv_heads * touched) as block, T.sblock("append"):
            piece = T.axis.spatial(batch * kv_heads * touched, block)
            whole = cache[0:batch, 0:kv_heads, 0:tiles, 0 : layout.tile_bytes // 4]
            T.reads(whole, *(x[0:batch, 0:kv_heads, 0:seq, 0:head_dim] for x in source))
            T.writes(whole)
            b = T.Bind(piece // (kv_heads * touched))
            head = T.Bind(piece // touched % kv_heads)
            start = T.Bind((lengths[b] - new_lengths[b]).astype("int64"))
            tile = T.Bind(start // 32 + piece % touched)
            place = T.Bind(tile % tiles) if wraps else tile
            kept = tile + tiles > (lengths[b].astype("int64") - 1) // 32 if wraps else tile < tiles
            first = T.Bind(tir.max(start - tile * 32, tir.const(0, "int64")))
            last = T.Bind(tir.min(lengths[b].astype("int64") - tile * 32, tir.const(32, "int64")))
            buffers = EncodeBuffers(axes, head_dim)
            codes = T.sblock_alloc_buffer((32 * head_dim,), "uint16", scope=axes.scratch)
            # A loop that may be empty, not a condition: the compiler puts no barrier inside a condition.
            zero = tir.const(0, "int64")
            count = register(tir.Select(kept, tir.max(last - first, zero), zero))
            for role, codec, x, rotation in zip("kv", (codec_k, codec_v), source, rotations, strict=True):
                target = TileWriter(cache, (b, head, place), layout, role)
                with T.serial(0, count) as n:
                    token = first + n

                    def load(dim: Expr, x: Any = x, token: Expr = token) -> Expr:
                        return x[b, head, tile * 32 + token - start, dim]

                    def store(dim: Expr, code: Expr, token: Expr = token) -> None:
                        T.buffer_store(codes, code.astype("uint16"), [token * head_dim + dim])

                    emit_encode(axes, codec, rotation, load, store, partial(target.store_gain, token), buffers)
                target.pack(axes, codes, first, last, count)
    return builder.get()
