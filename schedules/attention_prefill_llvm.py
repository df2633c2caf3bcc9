"""Prefill attention for CPUs: the vector form of ``ops.attention_prefill``, a block of query rows at a time."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.segments import Segments, segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .attention_core_llvm import AttentionCore, wide
from .chunk_source_llvm import ChunkSource
from .segments_llvm import SegmentStream
from .vector_ops import cast, lanes, splat
from .vector_target import VectorTarget

Expr = Any
ROWS = 32
"""Query rows (tokens × grouped heads) that share one unpacked tile; 24 to 48 measured alike."""


def attention_prefill_llvm(shape: SiteShape, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Build the kernel; parameters and results are those of ``ops.attention_prefill``."""
    heads, kv_heads, group, head_dim = shape.heads, shape.kv_heads, shape.group, shape.head_dim
    codecs, policy = shape.codecs(), shape.cache_policy
    layout = TileLayout(codecs[0].format, codecs[1].format, head_dim)
    words, tokens = layout.tile_bytes // 4, max(4, ROWS // group)
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    blocks = (seq + (tokens - 1)) // tokens
    zero = tir.const(0, "int32")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_prefill")
        T.func_attr({OP_ATTR: "attention_prefill", "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.arg("q", T.buffer((batch, seq, heads, head_dim), shape.dtype))
        k, v = (T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), shape.dtype)) for name in ("k", "v"))
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, seq, heads, head_dim), shape.dtype))
        with T.parallel(0, batch * kv_heads * blocks) as block, T.sblock("rows"):
            piece = T.axis.spatial(batch * kv_heads * blocks, block)
            whole = arrays[0][0:batch, 0:kv_heads, 0:tiles, 0:words]
            T.reads(q[0:batch, 0:seq, 0:heads, 0:head_dim], whole)
            T.writes(out[0:batch, 0:seq, 0:heads, 0:head_dim])
            # The last rows have the most keys: they go first, so that no thread ends up alone with them.
            b, head = piece % (batch * kv_heads) // kv_heads, piece % kv_heads
            first = ((blocks - 1 - piece // (batch * kv_heads)) * tokens).astype("int32")
            new, past = new_lengths[b], lengths[b] - new_lengths[b]
            registers = VectorTarget.of(target).registers
            core = AttentionCore(tokens * group, head_dim, registers, bool(policy.center), shape.softcap)

            def token(row: Expr) -> Expr:
                return first + row // group

            def oldest(row: Expr) -> Expr:
                return tir.max(past + token(row) - (shape.window - 1), zero) if shape.window else zero

            with T.If(first < new), T.Then():
                stream = SegmentStream(core, Segments(arrays, codecs, layout, policy, shape.wraps), target)
                chunk = ChunkSource(core, k, v)
                core.start(
                    lambda row, dim: wide(q, [b, token(row), head * group + row % group], dim),
                    lambda row: tir.all(row < tokens * group, token(row) < new),
                    shape.scale,
                )
                stream.feed((b, head), past, (oldest(0), oldest))
                last = tir.min(first + tokens, new)
                with T.serial(0, (last + 31) // 32) as tile:
                    with T.If(past + tile * 32 + 32 > oldest(0)), T.Then():
                        chunk.load([b, head], tile * 32, new)
                        core.tile(past + tile * 32, oldest, lambda row: past + tir.min(token(row), new - 1))
            _store(core, out, (b, head), (first, new, seq, group), tokens, shape.dtype)
    return shape.attach(builder.get())


def _store(
    core: AttentionCore, out: Any, where: tuple[Expr, Expr], limits: tuple[Expr, ...], tokens: int, dtype: str
) -> None:
    """Write the block's rows; zeros where a row is no real token."""
    b, head = where
    first, new, seq, group = limits
    with T.serial(0, tokens * group) as row:
        token = first + row // group

        def store(dim: Expr, value: Expr) -> None:
            T.buffer_store(out, cast(value, dtype), [b, token, head * group + row % group, lanes(dim)])

        with T.If(token < new):
            with T.Then():
                core.finish(row, True, store)
            with T.Else():
                with T.If(token < seq.astype("int32")), T.Then():
                    with T.serial(0, core.head_dim // 16) as sixteen:
                        store(sixteen * 16, splat(0.0))
