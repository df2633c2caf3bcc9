"""Flush: the oldest tokens of the 16-bit ring are centred, quantized and packed into tiles, a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from ..formats import TOKENS, Codec, TileLayout
from ..formats.centre import centre_words
from .axes import Axes
from .centre import CentreWriter
from .tile_writer import TileWriter
from .vector_code import EncodeBuffers, emit_encode, f32, register, sanitize

Expr = Any
Load = Callable[[Expr, Expr], Expr]


def flush(
    codec_k: Codec,
    codec_v: Codec,
    kv_heads: int,
    dtype: str,
    policy: CachePolicy,
    axes: Axes,
    *,
    wraps: bool = False,
    after: int = 0,
) -> tvm.tirx.PrimFunc:
    """Build ``flush(cache[, centre], plain, k, v, before, packed, lengths, new_lengths[, seen])``.

    cache and centre are updated in place. Shapes: cache uint32 [batch, kv_heads, tiles, tile_bytes/4]; centre uint32
    [batch, kv_heads, blocks, head_dim/4 + 1] (``formats.centre``), only if the policy centres K; plain float16
    [batch, kv_heads, 2, sinks + ring, head_dim], K and V rows of the sinks and the ring as they are *before* this
    call's tokens enter; k, v ``dtype`` [batch, kv_heads, seq, head_dim], the new tokens, rotated; before, packed
    int32 [batch], the tokens in tiles before and after; lengths int32 [batch] with the new tokens, new_lengths int32
    [batch] of them. A block that was begun earlier keeps its centre. ``wraps``: tiles and centres are rings
    (``window_ring``), into which the last blocks go. ``after`` heads: the output ``dtype`` [batch, seq, after,
    head_dim] of the attention that must have read the cache before; it is not read.
    """
    head_dim = codec_k.head_dim
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, seq, tiles, blocks = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles", "blocks"))
    size, slots, words = max(policy.block, TOKENS), policy.slots, centre_words(head_dim)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("flush")
        T.func_attr({"rotquant.op": "flush", "tirx.noalias": True})
        cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, layout.tile_bytes // 4), "uint32"))
        centre: Any = None
        if policy.center:
            centre = T.arg("centre", T.buffer((batch, kv_heads, blocks, words), "uint32"))
        plain = T.arg("plain", T.buffer((batch, kv_heads, 2, slots, head_dim), "float16"))
        new = [T.arg(n, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for n in ("k", "v")]
        before, packed, lengths, new_lengths = (
            T.arg(n, T.buffer((batch,), "int32")) for n in ("before", "packed", "lengths", "new_lengths")
        )
        if after:
            T.arg("seen", T.buffer((batch, seq, after, head_dim), dtype))
        touched = (seq + (policy.ring + 2 * size - 2)) // size
        with axes.blocks(batch * kv_heads * touched) as index, T.sblock("flush"):
            piece = T.axis.spatial(batch * kv_heads * touched, index)
            whole = cache[0:batch, 0:kv_heads, 0:tiles, 0 : layout.tile_bytes // 4]
            written = [whole] + ([centre[0:batch, 0:kv_heads, 0:blocks, 0:words]] if policy.center else [])
            T.reads(*written, plain[0:batch, 0:kv_heads, 0:2, 0:slots, 0:head_dim])
            T.writes(*written)
            b, head = T.Bind(piece // (kv_heads * touched)), T.Bind(piece // touched % kv_heads)
            first = register(before[b].astype("int64") // size + piece % touched)  # the block
            start = register((lengths[b] - new_lengths[b]).astype("int64"))

            def load(role: int) -> Load:
                return _token_loader(plain, new[role], (b, head, role), start, policy)

            from_token = register(tir.max(before[b].astype("int64"), first * size))
            end = packed[b].astype("int64")
            block, kept = first, tiles * TOKENS
            if wraps:
                block = register(first % (tiles * TOKENS // size))
                kept = tir.Select(first * size + tiles * TOKENS >= end, end, tir.const(0, "int64"))
            to_token = register(tir.min(tir.min(end, (first + 1) * size), kept))
            mean = None
            if centre is not None:
                taken = CentreWriter(axes, centre, (b, head, block), head_dim)
                begun = from_token > first * size
                count = tir.Select(begun, tir.const(0, "int64"), tir.max(to_token - from_token, tir.const(0, "int64")))
                taken.take(load(0), from_token, register(count))
                mean = taken.mean
            _emit_tiles(axes, cache, (b, head), (codec_k, codec_v), layout, load, mean, (from_token, to_token), wraps)
    return builder.get()


def _token_loader(plain: Any, new: Any, where: tuple[Expr, Expr, int], start: Expr, policy: CachePolicy) -> Load:
    """A token behind the sinks, by its number there: from the ring, or from the new tokens."""
    b, head, role = where
    seq = new.shape[2]

    def load(number: Expr, dim: Expr) -> Expr:
        arrived = number + policy.sinks - start
        fresh = new[b, head, tir.max(tir.min(arrived, seq - 1), tir.const(0, "int64")), dim]
        if not policy.ring:
            return f32(fresh)
        kept = plain[b, head, role, number % policy.ring + policy.sinks, dim]
        return tir.if_then_else(arrived >= 0, sanitize(fresh), f32(kept))

    return load


def _emit_tiles(
    axes: Axes,
    cache: Any,
    where: tuple[Expr, Expr],
    codecs: tuple[Codec, Codec],
    layout: TileLayout,
    load: Callable[[int], Load],
    mean: Any,
    tokens: tuple[Expr, Expr],
    wraps: bool,
) -> None:
    """Quantize and pack tokens ``tokens[0]`` … ``tokens[1] - 1``, which lie in one block, tile by tile."""
    b, head = where
    from_token, to_token = tokens
    head_dim, zero = layout.head_dim, tir.const(0, "int64")
    buffers = EncodeBuffers(axes, head_dim)
    codes = T.sblock_alloc_buffer((TOKENS * head_dim,), "uint16", scope=axes.scratch)
    # Loops that may be empty, not conditions: the compiler puts no barrier inside a condition.
    steps = register(tir.Select(to_token > from_token, (to_token - 1) // TOKENS - from_token // TOKENS + 1, zero))
    with T.serial(0, steps) as step:
        tile = from_token // TOKENS + step
        place = register(tile % cache.shape[2]) if wraps else tile
        low = register(tir.max(from_token - tile * TOKENS, zero))
        high = register(tir.min(to_token - tile * TOKENS, tir.const(TOKENS, "int64")))
        for role, codec in enumerate(codecs):
            target, source = TileWriter(cache, (b, head, place), layout, "kv"[role]), load(role)
            less = mean if role == 0 else None
            with T.serial(0, high - low) as n:
                token = low + n

                def element(dim: Expr, token: Expr = token, source: Load = source, less: Any = less) -> Expr:
                    value = source(tile * TOKENS + token, dim)
                    return value if less is None else value - less[dim]

                def store(dim: Expr, code: Expr, token: Expr = token) -> None:
                    T.buffer_store(codes, code.astype("uint16"), [token * head_dim + dim])

                store_gain = partial(target.store_gain, token)
                emit_encode(axes, codec.in_rotated_basis(), None, element, store, store_gain, buffers)
            target.pack(axes, codes, low, high, high - low)
