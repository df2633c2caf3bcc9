"""Prefill attention on tensor cores, on CUDA: the kernel for ``ops.attention_prefill``.

A thread block takes some query rows of one kv head: the query heads that share it, of neighbouring tokens. The packed
past comes first, unpacked tile by tile into float16 in shared memory; 16-bit rows, the policy's and the chunk's own,
follow. Blocks with the most keys start first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.ops.online_softmax import LOG2E
from rotquant_tvm.ops.segments import Segments, segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import WARP, block_sync, f32, i32, scalar
from .cuda_target import compute_capability, dynamic_shared_memory
from .half_formats_cuda import half_format
from .knobs import chosen_knobs
from .mma_half_cuda import FragmentValues, HalfRows, WarpAttention
from .packed_half_cuda import HalfFormat
from .packed_past_cuda import PackedPast
from .prefill_rows_cuda import QueryRows, Sight
from .prefill_tiling_cuda import KNOBS as KNOBS
from .prefill_tiling_cuda import PrefillTiling, prefill_tiling
from .row_stream_cuda import KeptRows, RowStream, commit_copies

Expr = Any


def attention_prefill_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The kernel for a definition, None for what it has none for: float32, GPUs before sm_80."""
    shape = SiteShape.of(func)
    if shape is None or shape.dtype != "float16" or shape.scale <= 0 or compute_capability(target) < 80:
        return None
    chosen = chosen_knobs(func)
    return prefill_kernel(shape, target, **{name: chosen[name] for name in KNOBS if name in chosen})


def prefill_kernel(shape: SiteShape, target: tvm.target.Target, **knobs: int) -> tvm.tirx.PrimFunc | None:
    """Build the kernel with some of ``KNOBS`` set; None if it does not fit the GPU or reads a format it does not know.

    Parameters and results are those of ``ops.attention_prefill``.
    """
    codecs, policy = shape.codecs(), shape.cache_policy
    layout = TileLayout(codecs[0].format, codecs[1].format, shape.head_dim)
    formats = [half_format(codec) for codec in codecs]
    if None in formats:
        return None
    centre_bytes = 4 * centre_words(shape.head_dim) if policy.center else 0
    sizes = layout.tile_bytes, centre_bytes, sum(len(form.table) for form in formats)
    tiling = prefill_tiling(shape.head_dim, sizes, dynamic_shared_memory(target), knobs)
    if tiling is None:
        return None
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("attention_prefill")
        T.func_attr({OP_ATTR: "attention_prefill", "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.arg("q", T.buffer((batch, seq, heads, head_dim), shape.dtype))
        k, v = (T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), shape.dtype)) for name in ("k", "v"))
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, seq, heads, head_dim), shape.dtype))
        blocks = (seq * shape.group + (tiling.rows - 1)) // tiling.rows
        with T.launch_thread("blockIdx.x", batch * kv_heads * blocks) as block:
            with T.launch_thread("threadIdx.x", tiling.threads) as thread:
                number, sequences = scalar(block.astype("int32")), scalar((batch * kv_heads).astype("int32"))
                turn = scalar(tir.truncdiv(number, sequences))
                piece = scalar(number - turn * sequences)
                first = scalar(((blocks - 1).astype("int32") - turn) * tiling.rows)
                b, head = scalar(tir.truncdiv(piece, kv_heads)), scalar(tir.truncmod(piece, kv_heads))
                new, past = scalar(new_lengths[b]), scalar(lengths[b] - new_lengths[b])
                rows = QueryRows(shape, tiling, thread, (b, head), first, seq, new)
                segments = Segments(arrays, codecs, layout, policy)
                _Block(rows, segments, tuple(formats), past).run(q, (k, v), out)
    return shape.attach(builder.get())


@dataclass(frozen=True)
class _Block:
    """What one thread block does for its rows; ``past`` tokens precede the chunk."""

    rows: QueryRows
    segments: Segments
    formats: tuple[HalfFormat, ...]
    past: Expr

    @property
    def tiling(self) -> PrefillTiling:
        return self.rows.tiling

    def run(self, q: Any, chunk: tuple[Any, Any], out: Any) -> None:
        tiling, thread = self.tiling, self.rows.thread
        shared = T.alloc_buffer((tiling.size,), "float16", scope="shared.dyn")
        lane, warp = scalar(thread % WARP), scalar(thread // WARP)
        attention = WarpAttention(tiling.head_dim, tiling.tokens, tiling.row_tiles)
        self.rows.load(shared, q)
        commit_copies()
        queries = HalfRows(shared, warp * (16 * tiling.row_tiles * tiling.pitch), tiling.head_dim, lane)
        sight = Sight(self.rows, lane, warp)
        keys = HalfRows(shared, tiling.rows * tiling.pitch, tiling.head_dim, lane)
        packed = scalar(self.segments.packed(self.rows.where[0], self.past))
        self._packed(attention, (queries, keys), sight, packed, lane)
        self._plain(attention, (queries, keys), sight, packed, chunk)
        attention.finish()
        self.rows.store(shared, out, attention)

    def _oldest(self) -> Expr:
        """How far behind the chunk's first token the oldest one is that a row sees; with a window only."""
        return self.rows.token(i32(0)) - (self.rows.shape.window - 1)

    def _packed(
        self, attention: WarpAttention, operands: tuple[HalfRows, HalfRows], sight: Sight, packed: Expr, lane: Expr
    ) -> None:
        """The tokens in tiles."""
        shape, policy, tiling = self.rows.shape, self.segments.policy, self.tiling
        queries, keys = operands
        begin = i32(0)
        if shape.window:
            begin = scalar(tir.max(self.past + self._oldest() - policy.sinks, 0) // TOKENS)
        some = self.rows.token(i32(0)) < self.rows.new
        centre = (self.segments.centre, policy.center // TOKENS) if policy.center else None
        past = PackedPast(
            tiling,
            self.segments.layout,
            (self.formats[0], self.formats[1]),
            keys.shared,
            self.rows.thread,
            self.segments.cache,
            centre,
            self.rows.where,
            begin,
            scalar(tir.Select(some, packed, i32(0))),
        )
        values = FragmentValues(keys.shared, past.values_first, tiling.head_dim, lane)
        factor = f32(shape.scale * LOG2E * past.key_factor)
        past.start()
        with T.serial(0, past.count) as number:
            past.ready(number)
            attention.multiply_keys(queries, keys.load_keys)
            first = past.first_token(number)
            where = scalar(first + policy.sinks - self.past), scalar(packed - first)
            with T.If(sight.limited(*where)), T.Then():
                attention.hide(sight.seen(*where), lane)
            attention.weigh(factor, past.value_octaves)
            attention.multiply_values(values.load_values)
        block_sync()

    def _plain(
        self,
        attention: WarpAttention,
        operands: tuple[HalfRows, HalfRows],
        sight: Sight,
        packed: Expr,
        chunk: tuple[Any, Any],
    ) -> None:
        """The tokens in 16 bits: the policy's and the chunk's own."""
        tiling, rows, policy = self.tiling, self.rows, self.segments.policy
        queries, keys = operands
        kept = self._kept(packed) if policy.segmented else None
        count = kept.count if kept else i32(0)
        begin = i32(0)
        if rows.shape.window:
            begin = tir.max(count + self._oldest(), kept.held if kept else 0)
            begin = scalar(tir.Select(self.past + self._oldest() < kept.held, 0, begin) if kept else begin)
        last = rows.token(i32(tiling.rows - 1))
        some = rows.token(i32(0)) < rows.new
        stop = scalar(tir.Select(some, count + tir.min(last + 1, rows.new), i32(0)))
        stream = RowStream(tiling, keys.shared, rows.thread, chunk, rows.where, kept, begin, stop)
        stream.start()
        with T.serial(0, stream.count) as number:
            stream.keys_ready(number)
            offset = stream.offset(number)
            attention.multiply_keys(queries, lambda *at: keys.load_keys(*at, offset))
            where = scalar(begin + number * tiling.tokens - count)
            self._hide(attention, sight, where, kept)
            attention.weigh(f32(rows.shape.scale * LOG2E))
            stream.values_ready(number)
            attention.multiply_values(lambda *at: keys.load_values(*at, tiling.role_size + offset))

    def _hide(self, attention: WarpAttention, sight: Sight, start: Expr, kept: KeptRows | None) -> None:
        lane = self.rows.thread % WARP
        limited, seen = sight.limited(start, None), sight.seen
        if kept is None or sight.window is None:
            with T.If(limited), T.Then():
                attention.hide(seen(start, None), lane)
            return
        # Between the sinks and the rows that follow them in the numbering, there are the packed tokens.
        sinks = scalar(start + kept.count - self.past)
        old = tir.all(start + kept.count < kept.held, sinks <= sight.last - sight.window)
        with T.If(tir.any(limited, old)), T.Then():
            near, far = seen(start, None), seen(sinks, None)
            left = scalar(kept.held - kept.count - start)
            attention.hide(lambda row, token: tir.if_then_else(token < left, far(row, token), near(row, token)), lane)

    def _kept(self, packed: Expr) -> KeptRows:
        policy = self.segments.policy
        held = scalar(tir.min(self.past, i32(policy.sinks)))
        ring = tir.max(self.past - policy.sinks - packed, 0) if policy.ring else i32(0)
        return KeptRows(self.segments.plain, policy, scalar(held + ring), held, packed)
