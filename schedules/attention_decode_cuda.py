"""Decode attention on packed K and V for GPUs: the tensor-core form of ``ops.attention_decode``, in one launch.

A thread block serves one stream (sequence, kv head, up to eight query heads of its group) and one split of its tokens.
Every warp reads tiles of its own (``packed_stream_cuda``); the codes go from memory to the tensor cores as they are,
through a table lookup in registers. The warps' results are merged in the block, the splits' by the block that arrives
last. Rows of the 16-bit segments are spread over the blocks of a stream, and read while their tiles are on the way.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.codegen import COUNTERS_ATTR
from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.ops.attention_decode import rotation_arguments
from rotquant_tvm.ops.online_softmax import LOG2E
from rotquant_tvm.ops.segments import segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import Registers, block_sync, f32, half2, i32, load_words, scalar, shared_array
from .cuda_target import dynamic_shared_memory, has_bulk_copies, multiprocessors
from .decode_knobs_cuda import KNOBS as KNOBS
from .decode_knobs_cuda import default_knobs
from .decode_softmax_cuda import SumSlots, merge_slots
from .dependent_launch_cuda import let_next_start, starts_early
from .knobs import chosen_knobs
from .merge_splits_cuda import Partials, arrives_last, normalized
from .packed_stream_cuda import PackedStream, Share, integer
from .plain_rows_cuda import PlainRows
from .query_rotation_cuda import SharedRows, few_taps
from .tile_ring_cuda import TileRing
from .trellis_tables_cuda import TrellisTables

Expr = Any
FORMATS = ("lloyd", "half", "linear", "trellis")
ARRIVALS = 1 << 16


def attention_decode_cuda(func: tir.PrimFunc, target: tvm.target.Target) -> tir.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``."""
    shape = SiteShape.of(func)
    return None if shape is None else build(shape, target, **chosen_knobs(func))


def build(shape: SiteShape, target: tvm.target.Target, **knobs: int) -> tir.PrimFunc | None:
    """Build the kernel; None for formats and soft-capped scores, which it lacks, and where shared memory is short.

    Parameters and results are those of ``ops.attention_decode``, and ``arrivals`` int32 [65536] before the output,
    0 between launches: at most so many streams (kv heads of all sequences) have several blocks.
    """
    codecs = shape.codecs()
    if any(codec.format.codebook not in FORMATS for codec in codecs) or shape.dtype not in ("float16", "float32"):
        return None
    if shape.softcap:
        return None
    if shape.cache_policy.center and not integer(codecs[0]):
        return None
    if shape.rotated and not all(few_taps(codec.rotation.structure) for codec in codecs):
        return None
    kernel = _Kernel(shape, target, knobs)
    return kernel.build() if kernel.fits else None


class _Kernel:
    def __init__(self, shape: SiteShape, target: tvm.target.Target, chosen: dict[str, int]) -> None:
        knobs = default_knobs(shape, target) | chosen
        self.shape, self.policy = shape, shape.cache_policy
        self.codecs = shape.codecs()
        self.layout = TileLayout(self.codecs[0].format, self.codecs[1].format, shape.head_dim)
        self.warps, self.blocks = knobs["warps"], knobs["blocks"]
        self.least, self.most, self.multiprocessors = knobs["least"], knobs["splits"], multiprocessors(target)
        # A choice of warps alone is not held to the registers of the rule's own.
        self.resident = knobs["resident"] if "warps" not in chosen or "resident" in chosen else 0
        self.head_blocks = -(-shape.group // 8)
        self.rows = -(-shape.group // self.head_blocks)
        self.streams = shape.kv_heads * self.head_blocks
        self.narrow = self.rows <= 4
        self.bulk = has_bulk_copies(target)
        self.limit = dynamic_shared_memory(target)
        self.tile_words = self.layout.tile_bytes // 4
        self.stages, self.rows_last = self._stages(knobs["stages"]), knobs["rows_last"]
        self.lets_start = starts_early(target)
        self.fits = 4 * self._words(self.stages) <= self.limit
        self.batch, self.tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")

    def _ring_words(self, stages: int) -> int:
        """Words of the warps' rings, or of what takes their place at the end."""
        rings = self.warps * stages * (self.tile_words + 2)
        sizes = self.rows, self.shape.head_dim
        return -(-max(rings, SumSlots.words(self.warps, *sizes), Partials.words(*sizes, 32 * self.warps)) // 4) * 4

    def _row_words(self) -> int:
        return SharedRows.words(self.rows, self.shape.head_dim) if self.shape.rotated else 0

    def _words(self, stages: int) -> int:
        plain = SumSlots.words(self.warps, self.rows, self.shape.head_dim) if self.policy.segmented else 0
        return self._ring_words(stages) + self._row_words() + -(-plain // 4) * 4 + TrellisTables.words(self.codecs)

    def _stages(self, wanted: int) -> int:
        """As many as asked for, or as fit the shared memory of a block (fewer warps where not one does)."""
        while self.warps > 1 and 4 * self._words(1) > self.limit:
            self.warps //= 2
        return max(n for n in range(1, wanted + 1) if n == 1 or 4 * self._words(n) <= self.limit)

    def build(self) -> tir.PrimFunc:
        shape, batch = self.shape, self.batch
        with IRBuilder() as builder, T.prim_func(s_tir=False):
            T.func_name("attention_decode")
            T.func_attr({OP_ATTR: "attention_decode", "tirx.noalias": True, COUNTERS_ATTR: ARRIVALS})
            self.q = T.arg("q", T.buffer((batch, 1, shape.heads, shape.head_dim), shape.dtype))
            self.arrays = segment_arguments(self.layout, self.policy, batch, shape.kv_heads, self.tiles)
            self.lengths = T.arg("lengths", T.buffer((batch,), "int32"))
            self.rotations = rotation_arguments(*self.codecs) if shape.rotated else ()
            self.arrivals = T.arg("arrivals", T.buffer((ARRIVALS,), "int32"))
            self.out = T.arg("out", T.buffer((batch, 1, shape.heads, shape.head_dim), shape.dtype))
            # Enough blocks to fill the GPU once, but some tiles for each warp: what another split costs in the merge is
            # about what a tile takes.
            least = self.warps * self.least
            most = tir.min((self.tiles + (least - 1)) // least, self.blocks // (batch * self.streams))
            few = tir.max(tir.const(self.most, "int64"), self.multiprocessors // (batch * self.streams))
            splits = tir.max(tir.min(most, few), tir.const(1, "int64"))
            self.partials = Partials(batch * self.streams, splits, self.rows, shape.head_dim)
            with T.launch_thread("blockIdx.x", batch * self.streams * splits) as block:
                with T.launch_thread("threadIdx.x", 32 * self.warps) as thread:
                    if self.resident:
                        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": self.resident}):
                            self._block(block, thread, splits)
                    else:
                        self._block(block, thread, splits)
        return shape.attach(builder.get())

    def _block(self, block: Expr, thread: Expr, splits: Expr) -> None:
        self.thread = thread
        self.lane, self.warp = scalar(thread % 32), scalar(thread // 32)
        self.splits = scalar(splits.astype("int32"))
        self.shared = shared_array(self._words(self.stages), "uint32")
        streams = scalar(i32(self.batch * self.streams))
        self.stream, self.split = scalar(i32(block) % streams), scalar(i32(block) // streams)
        self.b = scalar(self.stream // self.streams)
        self.head = scalar(self.stream % self.streams // self.head_blocks)
        self.head_block = scalar(self.stream % self.head_blocks)
        self.rotated = SharedRows(
            self.shared, self._ring_words(self.stages), self.rows, self.shape.head_dim, thread, 32 * self.warps
        )
        # What follows may read its weights beside this kernel. This one does not start early itself: blocks that wait
        # would stand where others of its own predecessor's should, and its share of what they save is small.
        let_next_start(self.lets_start)
        # Asked for first, since nothing else needs to be known: the sequence's length and its tiles come meanwhile.
        queries = self._queries()
        length = scalar(self.lengths[self.b])
        oldest = scalar(tir.max(length - self.shape.window, i32(0)) if self.shape.window else i32(0))
        packed = scalar(self._packed(length))
        tiles = self._tiles(oldest, packed)
        load = queries()
        more = self._plain(load, (oldest, packed, length)) if self.policy.segmented else None
        tiles.expect_centres(self.arrays[1] if self.policy.center else None)
        tiles.keys.start(load, self.shape.scale * LOG2E)
        tiles.stream()
        self._finish(tiles, more)

    def _plain(self, load: Any, bounds: tuple[Expr, Expr, Expr]) -> tuple[SumSlots, Expr]:
        """Attend to the block's share of the 16-bit rows; returns the sums and how many of them there are."""
        place = self._ring_words(self.stages) + self._row_words()
        slots = SumSlots(self.shared, place, self.warps, self.rows, self.shape.head_dim)
        rows = PlainRows(self.arrays[-2], (self.b, self.head), self.policy, self.shape.head_dim)
        turns = scalar(rows.turns(bounds))
        if self.rows_last:  # from the last warp of the last block on
            slot, before, step = self.warps - 1 - self.warp, (self.splits - 1 - self.split) * self.warps, 1
        else:  # a warp of every block, then a second one of each
            slot, before, step = self.warp, self.split, self.splits
        slot, first = scalar(slot), scalar(before)
        mine = scalar(tir.max(turns - first + (step - 1), i32(0)) // step)
        with T.If(slot < mine), T.Then():
            rows.keys.start(load, self.shape.scale * LOG2E)
            rows.stream(self.lane, scalar(first + slot * step), scalar(self.splits * self.warps))
            slots.put(rows.weights, slot, self.lane, lambda j, half: rows.place(self.lane, j, half))
        return slots, scalar(tir.min(mine, i32(self.warps)))

    def _tiles(self, oldest: Expr, packed: Expr) -> PackedStream:
        """Begin to copy the warp's tiles."""
        ring = TileRing(
            self.shared,
            scalar(self.warp * (self.stages * self.tile_words)),
            scalar(self.warps * self.stages * self.tile_words + self.warp * (2 * self.stages)),
            self.stages,
            self.tile_words,
            self.lane,
            self.bulk,
        )
        tables = TrellisTables(self.codecs, self.shared, self._words(self.stages) - TrellisTables.words(self.codecs))
        tiles = PackedStream(self.codecs, self.layout, self.policy, ring, self.narrow, tables, self.shape.wraps)
        behind = scalar(oldest - self.policy.sinks)
        first = scalar(tir.max(behind, i32(0)) // TOKENS + self.split * self.warps + self.warp)
        step = scalar(self.splits * self.warps)
        count = scalar(tir.max((packed + (TOKENS - 1)) // TOKENS - first + (step - 1), i32(0)) // step)
        tiles.begin(self.arrays[0], (self.b, self.head), Share(first, step, count, packed, behind))
        tables.fill(self.thread, 32 * self.warps)
        return tiles

    def _packed(self, length: Expr) -> Expr:
        stored = length
        if self.policy.segmented:
            stored = tir.min(self.arrays[-1][self.b], tir.max(length - self.policy.sinks, i32(0)))
        return stored if self.shape.wraps else tir.min(stored, i32(self.tiles * TOKENS))

    def _query_head(self, row: Expr) -> Expr:
        """The query head of a row; rows beyond the group repeat its last head, and are never stored."""
        return self.head * self.shape.group + tir.min(self.head_block * self.rows + row, i32(self.shape.group - 1))

    def _queries(self) -> Any:
        """Begin to load the queries; calling what is returned gives the lane's elements (``LoadQuery``).

        They are rotated then, by all threads of the block, if the kernel takes raw queries.
        """
        row = tir.min(self.lane // 4 % 4 if self.narrow else self.lane // 4, i32(self.rows - 1))
        if self.shape.rotated:
            return self._rotated_queries(scalar(row))
        query_head = scalar(self._query_head(row))
        single = self.shape.dtype == "float32"
        each = 4 if single else 2
        words = Registers(each * (self.shape.head_dim // 16), "float32" if single else "uint32")
        for step in range(self.shape.head_dim // 16):
            index = [self.b, 0, query_head, 16 * step + 4 * (self.lane % 4)]
            load_words(words, each * step, self.q, index, each, "global")

        def load(step: int) -> list[Expr]:
            found = [words[each * step + k] for k in range(each)]
            return found if single else [value for word in found for value in half2(word)]

        return lambda: load

    def _rotated_queries(self, row: Expr) -> Any:
        rows, structure = self.rotated, self.codecs[0].rotation.structure
        ahead = rows.ask(structure, self.rotations[0])
        put = rows.hold(lambda r, dim: f32(self.q[self.b, 0, self._query_head(r), dim]))

        def load(step: int) -> list[Expr]:
            values = Registers(4, "float32")
            load_words(values, 0, self.shared, [rows.at(row, 16 * step + 4 * (self.lane % 4))], 4, "shared")
            return list(values)

        def rotated() -> Any:
            put()
            rows.rotate(structure, self.rotations[0], ahead)
            return load

        return rotated

    def _finish(self, tiles: PackedStream, more: tuple[SumSlots, Expr] | None) -> None:
        """Merge the warps' sums, and ``more`` of them, then the splits; store the output."""
        where, rows = (self.stream, self.split), self.rotated

        def put(row: Expr, dim: Expr, value: Expr) -> None:
            rows.put(row, dim, value) if self.shape.rotated else self._store(row, dim, value)

        def store(row: Expr, dim: Expr, value: Expr, reference: Expr, total: Expr) -> None:
            with T.If(self.splits == 1):
                with T.Then():
                    put(row, dim, normalized(value, total))
                with T.Else():
                    self.partials.store(where, row, dim, (value, reference, total))

        block_sync()  # the warps have read all of their tiles
        own = SumSlots(self.shared, 0, self.warps, self.rows, self.shape.head_dim)
        own.put(tiles.weights, self.warp, self.lane, tiles.place)
        merge_slots(own, tiles.values.scale, more, self.thread, store)
        last, back = Registers(1, "int32"), self.codecs[1].inverse_rotation.structure
        ahead = rows.ask(back, self.rotations[1]) if self.shape.rotated else None
        last[0] = i32(1)
        with T.If(self.splits > 1), T.Then():
            arrived = arrives_last(self.arrivals, self.stream, self.splits, self.shared, self.thread)
            last[0] = i32(arrived)
            with T.If(arrived), T.Then():
                self.partials.merge(self.stream, self.splits, (self.thread, 32 * self.warps), self.shared, put)
        if self.shape.rotated:
            with T.If(last[0] == 1), T.Then():
                rows.rotate(back, self.rotations[1], ahead)
                rows.each(lambda row, dim: self._store(row, dim, rows.get(row, dim)))

    def _store(self, row: Expr, dim: Expr, value: Expr) -> None:
        with T.If(self.head_block * self.rows + row < self.shape.group), T.Then():
            T.buffer_store(self.out, value.astype(self.shape.dtype), [self.b, 0, self._query_head(row), dim])
