"""Decode attention: one query token per sequence against the packed cache, in splits merged by log-sum-exp."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import NO_POLICY, CachePolicy
from ..formats import Codec, TileLayout
from .axes import Axes
from .online_softmax import LOG2E, MASKED, OnlineSoftmax
from .segments import Segments, segment_arguments
from .vector_code import emit_rotation, f32, rotation_size

Expr = Any


def attention_decode(
    codec_k: Codec,
    codec_v: Codec,
    heads: int,
    kv_heads: int,
    scale: float,
    dtype: str,
    axes: Axes,
    *,
    splits: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    policy: CachePolicy = NO_POLICY,
    rotated: bool = False,
) -> tvm.tirx.PrimFunc:
    """Build ``attention_decode(q, cache[[, centre], plain, packed], lengths[, rotation_k, inverse_v], out)``.

    Shapes: q ``dtype`` [batch, 1, heads, head_dim], in the keys' rotated basis; the cache's arrays as
    ``segment_arguments`` says, with the new token already appended; lengths int32 [batch]; out ``dtype``
    [batch, 1, heads, head_dim], in the values' rotated basis (zero for a sequence of length 0). Tokens past the
    capacity, which append drops, are not read.
    ``heads`` is a multiple of ``kv_heads`` (grouped queries). ``window``: only the last so many tokens are attended to,
    and the tiles are a ring (``window_ring``).
    ``softcap`` bounds the scaled scores (``ops.soft_cap``).
    ``rotated``: queries and output are in the model's own basis; the operator rotates the one by ``rotation_k`` and the
    other by ``inverse_v`` (float32, data of the keys' rotation and of the values' inverse one).
    """
    head_dim, group = codec_k.head_dim, heads // kv_heads
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")
    words = layout.tile_bytes // 4
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_decode")
        T.func_attr({"rotquant.op": "attention_decode", "tirx.noalias": True})
        q = T.arg("q", T.buffer((batch, 1, heads, head_dim), dtype))
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        rotations = rotation_arguments(codec_k, codec_v) if rotated else (None, None)
        out = T.arg("out", T.buffer((batch, 1, heads, head_dim), dtype))
        partial = T.sblock_alloc_buffer((batch, kv_heads, splits, group, head_dim), "float32")
        sums = T.sblock_alloc_buffer((batch, kv_heads, splits, group, 2), "float32")
        with axes.blocks(batch * (kv_heads * splits)) as block, T.sblock("split"):
            piece = T.axis.spatial(batch * (kv_heads * splits), block)
            whole = arrays[0][0:batch, 0:kv_heads, 0:tiles, 0:words]
            T.reads(q[0:batch, 0, 0:heads, 0:head_dim], whole, lengths[0:batch])
            T.writes(
                partial[0:batch, 0:kv_heads, 0:splits, 0:group, 0:head_dim],
                sums[0:batch, 0:kv_heads, 0:splits, 0:group, 0:2],
            )
            b, head, split = piece // (kv_heads * splits), piece // splits % kv_heads, piece % splits
            state = OnlineSoftmax(axes, group, head_dim, softcap)
            load = lambda row, dim: f32(q[b, 0, head * group + row, dim])  # noqa: E731
            state.start(load, scale)
            if rotations[0] is not None:
                _rotate_queries(axes, state, codec_k.rotation.structure, rotations[0], load, scale)
            length = lengths[b]
            oldest = tir.max(length - window, tir.const(0, "int32")) if window else tir.const(0, "int32")
            segments = Segments(arrays, (codec_k, codec_v), layout, policy, bool(window))
            segments.stream(state, (b, head), length, oldest, split.astype("int32"), splits)

            def store_sums(row: Expr, peak: Expr, total: Expr) -> None:
                T.buffer_store(sums, peak, [b, head, split, row, 0])
                T.buffer_store(sums, total, [b, head, split, row, 1])

            state.partial(
                lambda row, dim, value: T.buffer_store(partial, value, [b, head, split, row, dim]), store_sums
            )
        after = (codec_v.inverse_rotation.structure, rotations[1]) if rotated else None
        merge_splits(axes, partial, sums, out, (batch, kv_heads, splits, group, head_dim), dtype, after)
    return builder.get()


def rotation_arguments(codec_k: Codec, codec_v: Codec) -> tuple[Any, Any]:
    """Declare the coefficients that a ``rotated`` kernel takes: of the keys' rotation and the values' inverse one."""
    pairs = (("rotation_k", codec_k.rotation), ("inverse_v", codec_v.inverse_rotation))
    sizes = [(name, rotation_size(rotation.structure, codec_k.head_dim)) for name, rotation in pairs]
    first, second = (T.arg(name, T.buffer((size,), "float32")) for name, size in sizes)
    return first, second


def _rotate_queries(axes: Axes, state: OnlineSoftmax, structure: Any, data: Any, load: Any, scale: float) -> None:
    """Put the rotated queries in the place of the raw ones."""
    head_dim = state.head_dim
    buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(2)]
    with T.serial(0, state.rows) as row:
        with axes.lanes(head_dim) as dim:
            T.buffer_store(buffers[0], load(row, dim) * f32(scale * LOG2E), [dim])
        result = emit_rotation(axes, structure, head_dim, data, *buffers)
        with axes.lanes(head_dim) as dim:
            T.buffer_store(state.query, result[dim], [row * head_dim + dim])


def merge_splits(
    axes: Axes, partial: Any, sums: Any, out: Any, shape: tuple[Any, ...], dtype: str, after: Any = None
) -> None:
    """Merge the splits' partial outputs by their log-sum-exp; ``after``: structure and data of a last rotation."""
    batch, kv_heads, splits, group, head_dim = shape
    with axes.blocks(batch * (kv_heads * group)) as block, T.sblock("merge"):
        piece = T.axis.spatial(batch * (kv_heads * group), block)
        T.reads(
            partial[0:batch, 0:kv_heads, 0:splits, 0:group, 0:head_dim],
            sums[0:batch, 0:kv_heads, 0:splits, 0:group, 0:2],
        )
        T.writes(out[0:batch, 0, 0 : kv_heads * group, 0:head_dim])
        b, head, row = piece // (kv_heads * group), piece // group % kv_heads, piece % group
        weight = T.sblock_alloc_buffer((splits,), "float32", scope=axes.scratch)
        count = 2 if after is not None else 0
        buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(count)]
        with axes.lanes(1) as _:
            peak, total = f32(MASKED), f32(0)
            for split in range(splits):
                peak = tir.max(peak, sums[b, head, split, row, 0])
            peak = T.Bind(peak)
            for split in range(splits):
                total = total + tir.exp2(sums[b, head, split, row, 0] - peak) * sums[b, head, split, row, 1]
            total = T.Bind(total)
            for split in range(splits):
                share = tir.exp2(sums[b, head, split, row, 0] - peak) / tir.Select(total > f32(0), total, f32(1))
                T.buffer_store(weight, share, [split])
        with axes.lanes(head_dim) as dim:
            merged = f32(0)
            for split in range(splits):
                merged = merged + weight[split] * partial[b, head, split, row, dim]
            if after is None:
                T.buffer_store(out, merged.astype(dtype), [b, 0, head * group + row, dim])
            else:
                T.buffer_store(buffers[0], merged, [dim])
        if after is not None:
            result = emit_rotation(axes, after[0], head_dim, after[1], *buffers)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(out, result[dim].astype(dtype), [b, 0, head * group + row, dim])
