"""Decode attention on packed K and V for CPUs: the vector form of ``ops.attention_decode``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.attention_decode import merge_splits
from rotquant_tvm.ops.axes import Axes
from rotquant_tvm.ops.segments import Segments, segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape
from rotquant_tvm.ops.vector_code import register

from .attention_core_llvm import AttentionCore, wide
from .integer_core_llvm import IntegerCore
from .integer_stream_llvm import IntegerStream, has_integer_core
from .segments_llvm import SegmentRows, SegmentStream
from .vector_ops import LANES, lanes
from .vector_target import VectorTarget

Expr = Any
BLOCK_BYTES = 1 << 15
"""Of the values of a block, so that they stay in the first cache."""
KNOBS: dict[str, tuple[int, ...]] = {"splits": (1, 2, 4, 8, 16, 32)}
"""Parts that a sequence is read in, each by one thread; the default is the definition's."""


def attention_decode_llvm(shape: SiteShape, target: tvm.target.Target, tiles: int = 0) -> tvm.tirx.PrimFunc:
    """Build the kernel; parameters and results are those of ``ops.attention_decode``.

    ``tiles``: those of a block, where attention is in integers; 0: as many as suit the first cache.
    """
    heads, kv_heads, group, head_dim, splits = shape.heads, shape.kv_heads, shape.group, shape.head_dim, shape.splits
    codecs, policy = shape.codecs(), shape.cache_policy
    layout = TileLayout(codecs[0].format, codecs[1].format, head_dim)
    words = layout.tile_bytes // 4
    integers = has_integer_core(codecs, target)
    # Beside the integer core's splits, the rows of 16 bits are one of their own.
    parts = splits + (1 if integers and policy.segmented else 0)
    batch, stored_tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_decode")
        T.func_attr({OP_ATTR: "attention_decode", "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.arg("q", T.buffer((batch, 1, heads, head_dim), shape.dtype))
        arrays = segment_arguments(layout, policy, batch, kv_heads, stored_tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, 1, heads, head_dim), shape.dtype))
        partial = T.sblock_alloc_buffer((batch, kv_heads, parts, group, head_dim), "float32")
        sums = T.sblock_alloc_buffer((batch, kv_heads, parts, group, 2), "float32")
        with T.parallel(0, batch * (kv_heads * parts)) as block, T.sblock("split"):
            piece = T.axis.spatial(batch * (kv_heads * parts), block)
            whole = arrays[0][0:batch, 0:kv_heads, 0:stored_tiles, 0:words]
            T.reads(q[0:batch, 0, 0:heads, 0:head_dim], whole, lengths[0:batch])
            T.writes(
                partial[0:batch, 0:kv_heads, 0:parts, 0:group, 0:head_dim],
                sums[0:batch, 0:kv_heads, 0:parts, 0:group, 0:2],
            )
            b, head, split = piece // (kv_heads * parts), piece // parts % kv_heads, piece % parts
            zero = tir.const(0, "int32")
            oldest = tir.max(lengths[b] - shape.window, zero) if shape.window else zero
            part = _Part(
                shape,
                target,
                Segments(arrays, codecs, layout, policy, shape.wraps),
                where=(b, head),
                stored=lengths[b],
                oldest=oldest,
                query=lambda row, dim: wide(q, [b, 0, head * group + row], dim),
                results=(partial, sums, [b, head, split]),
            )
            number = split.astype("int32")
            if not integers:
                part.by_values(number, splits)
            elif parts == splits:
                part.in_integers(number, splits, tiles)
            else:
                with T.If(split < splits):
                    with T.Then():
                        part.in_integers(number, splits, tiles)
                    with T.Else():
                        part.rows()
        merge_splits(Axes("llvm"), partial, sums, out, (batch, kv_heads, parts, group, head_dim), shape.dtype)
    return shape.attach(builder.get())


@dataclass
class _Part:
    """What one task does: attention of a group of queries to a part of the tokens of a sequence and head ``where``.

    ``stored`` tokens are there, of which those from ``oldest`` on are seen. ``query(row, dim)`` loads 16 dims of a
    query. ``results``: the buffers of the parts' outputs, and of their peaks and totals, and the place in both.
    """

    shape: SiteShape
    target: tvm.target.Target
    segments: Segments
    where: tuple[Expr, Expr]
    stored: Expr
    oldest: Expr
    query: Callable[[Expr, Expr], Expr]
    results: tuple[Any, Any, list[Expr]]

    def by_values(self, split: Expr, splits: int) -> None:
        """A split of all tokens, unpacked to float32."""
        core = self._core(bool(self.segments.policy.center))
        stream = SegmentStream(core, self.segments, self.target)
        self._start(core)
        stream.feed(self.where, self.stored, (self.oldest, lambda _: self.oldest), split, splits)
        self._store(core, lambda row, store: core.finish(row, False, store))

    def in_integers(self, split: Expr, splits: int, tiles: int) -> None:
        """A split of the packed tokens, as bytes."""
        group, head_dim, policy = self.shape.group, self.shape.head_dim, self.segments.policy
        tiles = tiles or max(2, min(8, BLOCK_BYTES // (32 * head_dim)))
        registers = VectorTarget.of(self.target).registers
        core = IntegerCore(group, head_dim, tiles, self.target, registers, bool(policy.center), self.shape.softcap)
        stream = IntegerStream(core, self.segments, self.target)
        self._start(core)
        stream.feed(self.where, self.stored, self.oldest, split, splits)
        self._store(core, core.finish)

    def rows(self) -> None:
        """The tokens in 16 bits."""
        core = self._core(False)
        self._start(core)
        packed = register(self.segments.packed(self.where[0], self.stored))
        rows = SegmentRows(core, self.segments)
        rows.feed(self.where, self.stored, packed, (self.oldest, lambda _: self.oldest))
        self._store(core, lambda row, store: core.finish(row, False, store))

    def _core(self, centred: bool) -> AttentionCore:
        registers = VectorTarget.of(self.target).registers
        return AttentionCore(self.shape.group, self.shape.head_dim, registers, centred, self.shape.softcap)

    def _start(self, core: AttentionCore | IntegerCore) -> None:
        core.start(self.query, lambda row: row < self.shape.group, self.shape.scale)

    def _store(self, core: AttentionCore | IntegerCore, finish: Callable[..., None]) -> None:
        """Hand over the unnormalized outputs, the peaks and the totals."""
        partial, sums, place = self.results
        with T.serial(0, self.shape.group) as row:
            finish(row, lambda dim, value: T.buffer_store(partial, value, [*place, row, lanes(dim)]))
            T.buffer_store(sums, core.peak[row * LANES], [*place, row, 0])
            T.buffer_store(sums, core.total[row * LANES], [*place, row, 1])
