"""Prefill attention on tensor cores, on CUDA: the kernel for ``ops.attention_prefill``.

A thread block takes some query rows of one kv head: the query heads that share it, of neighbouring tokens. The packed
past comes first, unpacked tile by tile into float16 in shared memory; 16-bit rows, the policy's and then the chunk's
own, follow. Between the past and the chunk there may be a change of basis (``prefill_rotation_cuda``). Blocks with the
most keys start first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.ops.online_softmax import LOG2E
from rotquant_tvm.ops.rotation_matrices import rotation_matrices
from rotquant_tvm.ops.segments import Segments, segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import WARP, block_sync, f32, scalar, shared_array
from .cuda_target import compute_capability, dynamic_shared_memory
from .half_formats_cuda import half_format
from .knobs import chosen_knobs
from .mma_half_cuda import HalfRows, WarpAttention
from .opaque_cuda import again
from .packed_half_cuda import HalfFormat
from .packed_past_cuda import PackedPast, RowsAndOperands
from .packed_tiles_cuda import PackedTiles
from .prefill_rotation_cuda import BasisChange
from .prefill_rows_cuda import QueryRows
from .prefill_spans_cuda import Sight, TokenSpans
from .prefill_tiling_cuda import KNOBS as KNOBS
from .prefill_tiling_cuda import PrefillTiling, prefill_tiling
from .row_stream_cuda import ChunkRows, KeptRows, RowStream, commit_copies, wait_for_copies

Expr = Any


def attention_prefill_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The kernel for a definition, None for what it has none for (``build``)."""
    shape = SiteShape.of(func)
    if shape is None:
        return None
    chosen = chosen_knobs(func)
    return build(shape, target, **{name: chosen[name] for name in KNOBS if name in chosen})


def build(shape: SiteShape, target: tvm.target.Target, **knobs: int) -> tvm.tirx.PrimFunc | None:
    """Build the kernel of a site with some of ``KNOBS`` set; None for what it lacks.

    This is float32, soft-capped scores, rings of tiles, GPUs before sm_80, and what ``prefill_kernel`` declines.
    """
    if shape.dtype != "float16" or shape.scale <= 0 or shape.softcap or shape.wraps:
        return None
    return prefill_kernel(shape, target, **knobs) if compute_capability(target) >= 80 else None


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
        matrices = rotation_matrices(*codecs, shape.dtype) if shape.rotated else None
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
                rows = QueryRows(shape, tiling.rows, thread, (b, head), first, seq, new)
                segments = Segments(arrays, codecs, layout, policy)
                _Block(rows, segments, (formats[0], formats[1]), past, tiling, matrices).run(q, (k, v), out)
    return shape.attach(builder.get())


class _Block:
    """What one thread block does for its rows; ``past`` tokens precede the chunk."""

    def __init__(
        self,
        rows: QueryRows,
        segments: Segments,
        formats: tuple[HalfFormat, HalfFormat],
        past: Expr,
        tiling: PrefillTiling,
        matrices: tuple[Any, Any] | None,
    ) -> None:
        self.rows, self.tiling = rows, tiling
        self.shared = shared = shared_array(tiling.size, "float16")
        lane = scalar(rows.thread % WARP)
        self.mine = scalar(rows.thread // WARP * (16 * tiling.row_tiles))
        self.attention = WarpAttention(tiling.head_dim, tiling.tokens, tiling.row_tiles)
        self.queries = HalfRows(shared, self.mine * tiling.pitch, tiling.head_dim, lane)
        self.keys = HalfRows(shared, tiling.stages_start, tiling.head_dim, lane)
        self.sight = Sight(rows, self.mine, 16 * tiling.row_tiles, tiling.tokens)
        self.spans = TokenSpans(rows, segments, past)
        starts = tiling.raw_start, tiling.centre_start, tiling.table_start
        raw = PackedTiles(
            segments, formats, shared, rows.where, rows.thread, tiling.threads, tiling.tokens // TOKENS, *starts
        )
        self.packed = PackedPast(tiling, raw, RowsAndOperands(tiling, shared, lane), self.spans)
        self.change = None
        if matrices is not None:
            self.change = BasisChange(tiling, shared, rows.thread, self.keys, matrices)

    def run(self, q: Any, chunk: tuple[Any, Any], out: Any) -> None:
        """Attend: to the past in its basis, then to the chunk in its own."""
        self._load(self.rows, q)
        if self.change is None:
            self.attention.clear()
            self._attend_to_past()
        else:
            self._attend_to_turned_past(self.change, q)
        stream = self._stream(ChunkRows(chunk, self.rows.where, self.spans.stop), self.spans.begin)
        self._attend_to_rows(stream, lambda first: self.spans.hide_chunk(self.attention, self.sight, first))
        with T.If(stream.count == 0), T.Then():
            wait_for_copies(0)  # of padding's rows, which nothing has waited for, and in whose place results are put
        self.attention.finish()
        self.rows.store(self.shared, out, self.attention, self.mine, self._place)

    def _attend_to_turned_past(self, change: BasisChange, q: Any) -> None:
        """The past, if there is one, with rotated queries; they and the sums are in the chunk's basis afterwards."""
        with T.If(self.spans.some_past):
            with T.Then():
                change.rotate_queries(self.attention, self.queries, self.mine, self._place)
                self.attention.clear()
                self._attend_to_past()
                change.unrotate_sums(self.attention)
                if change.matrices[0] is not None:
                    self._load(replace(self.rows, thread=again(self.rows.thread)), q)
            with T.Else():
                self.attention.clear()

    def _place(self, row: Expr, unit: Expr) -> Expr:
        return row * self.tiling.pitch + unit * 8

    def _load(self, rows: QueryRows, q: Any) -> None:
        rows.load(self.shared, q, self._place, self.tiling.threads)
        commit_copies()

    def _stream(self, source: ChunkRows | KeptRows, begin: Expr) -> RowStream:
        return RowStream(self.tiling, self.shared, self.rows.thread, source, begin)

    def _attend_to_past(self) -> None:
        """The packed tokens, then the policy's rows; ends where all warps have left the stages' place."""
        self._attend_to_packed()
        kept = self.spans.kept
        if kept is not None:
            stream = self._stream(kept, self.spans.kept_begin)
            self._attend_to_rows(
                stream, lambda first: self.spans.hide_kept(self.attention, self.sight, kept, first)
            )
            block_sync()

    def _attend_to_packed(self) -> None:
        attention, past = self.attention, self.packed
        factor = f32(self.rows.shape.scale * LOG2E * past.raw.key_factor)
        past.start()
        with T.serial(0, past.count) as number:
            past.ready(number)
            attention.multiply_keys(self.queries, self.keys.load_keys)
            if past.raw.late_gains:
                attention.scale_scores(past.place.gains)
            self.spans.hide_packed(attention, self.sight, past.first_token(number))
            attention.weigh(factor, past.raw.value_octaves)
            attention.multiply_values(past.place.values.load_values)
        block_sync()

    def _attend_to_rows(self, stream: RowStream, hide: Callable[[Expr], None]) -> None:
        attention, keys = self.attention, self.keys
        stream.start()
        with T.serial(0, stream.count) as number:
            stream.keys_ready(number)
            offset = stream.offset(number)
            attention.multiply_keys(self.queries, lambda *at: keys.load_keys(*at, offset))
            hide(stream.begin + number * self.tiling.tokens)
            attention.weigh(f32(self.rows.shape.scale * LOG2E))
            stream.values_ready(number)
            attention.multiply_values(lambda *at: keys.load_values(*at, self.tiling.role_size + offset))
