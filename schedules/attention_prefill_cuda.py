"""Prefill attention on tensor cores, on CUDA: the kernel for ``ops.attention_prefill``.

A thread block takes some query rows of one kv head: the query heads that share it, of neighbouring tokens. The packed
past comes first, unpacked tile by tile into float16 in shared memory; 16-bit rows, the policy's and the chunk's own,
follow. Blocks with the most keys start first.
"""

from __future__ import annotations

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

from .cuda_ops import WARP, block_sync, f32, scalar, shared_array
from .cuda_target import compute_capability, dynamic_shared_memory
from .half_formats_cuda import half_format
from .knobs import chosen_knobs
from .mma_half_cuda import HalfRows, WarpAttention
from .packed_half_cuda import HalfFormat
from .packed_past_cuda import PackedPast, RowsAndOperands
from .packed_tiles_cuda import PackedTiles
from .prefill_rows_cuda import QueryRows
from .prefill_spans_cuda import Sight, TokenSpans
from .prefill_tiling_cuda import KNOBS as KNOBS
from .prefill_tiling_cuda import PrefillTiling, prefill_tiling
from .row_stream_cuda import RowSource, RowStream, commit_copies

Expr = Any


def attention_prefill_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The kernel for a definition, None for what it has none for.

    These are float32, soft-capped scores, rings of tiles, and GPUs before sm_80.
    """
    shape = SiteShape.of(func)
    if shape is None or shape.dtype != "float16" or shape.scale <= 0 or shape.softcap or shape.wraps:
        return None
    if compute_capability(target) < 80:
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
                rows = QueryRows(shape, tiling.rows, thread, (b, head), first, seq, new)
                segments = Segments(arrays, codecs, layout, policy)
                _run(rows, segments, (formats[0], formats[1]), past, tiling, (q, (k, v), out))
    return shape.attach(builder.get())


def _run(
    rows: QueryRows,
    segments: Segments,
    formats: tuple[HalfFormat, HalfFormat],
    past: Expr,
    tiling: PrefillTiling,
    tensors: tuple[Any, tuple[Any, Any], Any],
) -> None:
    """What one thread block does for its rows; ``past`` tokens precede the chunk."""
    q, chunk, out = tensors
    shared = shared_array(tiling.size, "float16")
    lane, mine = scalar(rows.thread % WARP), scalar(rows.thread // WARP * (16 * tiling.row_tiles))

    def place(row: Expr, unit: Expr) -> Expr:
        return row * tiling.pitch + unit * 8

    attention = WarpAttention(tiling.head_dim, tiling.tokens, tiling.row_tiles)
    rows.load(shared, q, place, tiling.threads)
    commit_copies()
    operands = (
        HalfRows(shared, mine * tiling.pitch, tiling.head_dim, lane),
        HalfRows(shared, tiling.stages_start, tiling.head_dim, lane),
    )
    sight = Sight(rows, mine, 16 * tiling.row_tiles, tiling.tokens)
    spans = TokenSpans(rows, segments, past)
    starts = tiling.raw_start, tiling.centre_start, tiling.table_start
    raw = PackedTiles(
        segments, formats, shared, rows.where, rows.thread, tiling.threads, tiling.tokens // TOKENS, *starts
    )
    past = PackedPast(tiling, raw, RowsAndOperands(tiling, shared, lane), spans)
    _attend_to_packed(attention, operands, (sight, spans), past)
    source = RowSource(chunk, rows.where, spans.kept, spans.stop)
    stream = RowStream(tiling, shared, rows.thread, source, spans.begin)
    _attend_to_rows(attention, operands, (sight, spans), stream, rows.shape.scale)
    attention.finish()
    rows.store(shared, out, attention, mine, place)


def _attend_to_packed(
    attention: WarpAttention, operands: tuple[HalfRows, HalfRows], limits: tuple[Sight, TokenSpans], past: PackedPast
) -> None:
    queries, keys = operands
    sight, spans = limits
    factor = f32(spans.rows.shape.scale * LOG2E * past.raw.key_factor)
    past.start()
    with T.serial(0, past.count) as number:
        past.ready(number)
        attention.multiply_keys(queries, keys.load_keys)
        spans.hide_packed(attention, sight, past.first_token(number))
        attention.weigh(factor, past.raw.value_octaves)
        attention.multiply_values(past.place.values.load_values)
    block_sync()


def _attend_to_rows(
    attention: WarpAttention,
    operands: tuple[HalfRows, HalfRows],
    limits: tuple[Sight, TokenSpans],
    stream: RowStream,
    scale: float,
) -> None:
    queries, keys = operands
    sight, spans = limits
    tiling = stream.tiling
    stream.start()
    with T.serial(0, stream.count) as number:
        stream.keys_ready(number)
        offset = stream.offset(number)
        attention.multiply_keys(queries, lambda *at: keys.load_keys(*at, offset))
        spans.hide_rows(attention, sight, spans.begin + number * tiling.tokens)
        attention.weigh(f32(scale * LOG2E))
        stream.values_ready(number)
        attention.multiply_values(lambda *at: keys.load_values(*at, tiling.role_size + offset))
