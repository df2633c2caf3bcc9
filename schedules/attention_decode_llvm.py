"""Decode attention on packed K and V for CPUs: the vector form of ``ops.attention_decode``."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.attention_decode import merge_splits
from rotquant_tvm.ops.axes import Axes
from rotquant_tvm.ops.segments import segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .attention_core_llvm import AttentionCore, wide
from .segments_llvm import SegmentStream
from .vector_ops import LANES, lanes
from .vector_target import VectorTarget

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {"splits": (1, 2, 4, 8, 16, 32)}
"""Parts that a sequence is read in, each by one thread; the default is the definition's."""


def attention_decode_llvm(shape: SiteShape, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Build the kernel; parameters and results are those of ``ops.attention_decode``."""
    heads, kv_heads, group, head_dim, splits = shape.heads, shape.kv_heads, shape.group, shape.head_dim, shape.splits
    codecs, policy = shape.codecs(), shape.cache_policy
    layout = TileLayout(codecs[0].format, codecs[1].format, head_dim)
    words = layout.tile_bytes // 4
    batch, tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_decode")
        T.func_attr({OP_ATTR: "attention_decode", "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.arg("q", T.buffer((batch, 1, heads, head_dim), shape.dtype))
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, 1, heads, head_dim), shape.dtype))
        partial = T.sblock_alloc_buffer((batch, kv_heads, splits, group, head_dim), "float32")
        sums = T.sblock_alloc_buffer((batch, kv_heads, splits, group, 2), "float32")
        with T.parallel(0, batch * (kv_heads * splits)) as block, T.sblock("split"):
            piece = T.axis.spatial(batch * (kv_heads * splits), block)
            whole = arrays[0][0:batch, 0:kv_heads, 0:tiles, 0:words]
            T.reads(q[0:batch, 0, 0:heads, 0:head_dim], whole, lengths[0:batch])
            T.writes(
                partial[0:batch, 0:kv_heads, 0:splits, 0:group, 0:head_dim],
                sums[0:batch, 0:kv_heads, 0:splits, 0:group, 0:2],
            )
            b, head, split = piece // (kv_heads * splits), piece // splits % kv_heads, piece % splits
            core = AttentionCore(group, head_dim, VectorTarget.of(target).registers, bool(policy.center), shape.softcap)
            stream = SegmentStream(core, arrays, codecs, layout, policy, target, shape.wraps)
            core.start(
                lambda row, dim: wide(q, [b, 0, head * group + row], dim), lambda row: row < group, shape.scale
            )
            zero = tir.const(0, "int32")
            oldest = tir.max(lengths[b] - shape.window, zero) if shape.window else zero
            stream.feed((b, head), lengths[b], (oldest, lambda _: oldest), split.astype("int32"), splits)
            with T.serial(0, group) as row:
                core.finish(
                    row,
                    False,
                    lambda dim, value: T.buffer_store(partial, value, [b, head, split, row, lanes(dim)]),
                )
                T.buffer_store(sums, core.peak[row * LANES], [b, head, split, row, 0])
                T.buffer_store(sums, core.total[row * LANES], [b, head, split, row, 1])
        merge_splits(Axes("llvm"), partial, sums, out, (batch, kv_heads, splits, group, head_dim), shape.dtype)
    return shape.attach(builder.get())
