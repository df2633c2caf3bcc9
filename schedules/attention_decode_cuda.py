"""Decode attention on packed K and V for GPUs: the tensor-core form of ``ops.attention_decode``, in one launch.

A thread block serves one stream (sequence, kv head, up to eight query heads of its group) and one split of its tokens.
Every warp reads tiles of its own (``packed_stream_cuda``); the codes go from memory to the tensor cores as they are,
through a table lookup in registers. The warps' results are merged in the block, the splits' by the block that arrives
last. Rows of the 16-bit segments are spread over the blocks of a stream, and read while their tiles are on the way;
or a few more blocks per stream have them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.codegen import COUNTERS_ATTR
from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.ops.attention_decode import rotation_arguments
from rotquant_tvm.ops.segments import segment_arguments
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import WARP, block_sync, i32, scalar, shared_array
from .cuda_target import dynamic_shared_memory, has_bulk_copies, multiprocessors
from .decode_knobs_cuda import KNOBS as KNOBS
from .decode_knobs_cuda import PROMISING as PROMISING
from .decode_knobs_cuda import RESERVED, default_knobs
from .decode_output_cuda import DecodeOutput
from .decode_place_cuda import DecodePlace
from .decode_queries_cuda import DecodeQueries
from .decode_softmax_cuda import SumSlots
from .dependent_launch_cuda import let_next_start, starts_early
from .knobs import chosen_knobs
from .merge_splits_cuda import Partials
from .packed_stream_cuda import PackedStream, Share, integer
from .plain_rows_cuda import PlainRows, PlainShare
from .query_rotation_cuda import SharedRows, few_taps
from .tile_centres_cuda import COLUMNS, FEW_COLUMNS, TileCentres
from .tile_ring_cuda import TileRing
from .trellis_tables_cuda import TrellisTables, is_trellis

Expr = Any
FORMATS = ("lloyd", "half", "linear", "trellis")
ARRIVALS = 1 << 16
ENOUGH = 48 * 1024
"""Bytes on their way to a multiprocessor, beyond which more of them only wait."""


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
        self.apart = knobs["apart"]
        # A choice of warps alone is not held to the registers of the rule's own.
        self.resident = knobs["resident"] if "warps" not in chosen or "resident" in chosen else 0
        self.head_blocks = -(-shape.group // 8)
        self.rows = -(-shape.group // self.head_blocks)
        self.streams = shape.kv_heads * self.head_blocks
        self.bulk = has_bulk_copies(target)
        self.limit = dynamic_shared_memory(target)
        self.tile_words = self.layout.tile_bytes // 4
        # Beside the tables of a trellis there is room for few.
        self.columns = FEW_COLUMNS if any(is_trellis(codec) for codec in self.codecs) else COLUMNS
        self.stages = self._stages(knobs["stages"])
        self.lets_start = starts_early(target)
        self.fits = 4 * self._words(self.stages) <= self.limit
        self.batch, self.tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")

    def _ring_words(self, stages: int) -> int:
        """Words of the warps' rings, or of what takes their place at the end."""
        centres = TileCentres.words(self.shape.head_dim, self.columns) if self.policy.center else 0
        rings = self.warps * (stages * (self.tile_words + 2) + centres)
        sizes = self.rows, self.shape.head_dim
        return -(-max(rings, SumSlots.words(self.warps, *sizes), Partials.words(*sizes, 32 * self.warps)) // 4) * 4

    def _row_words(self) -> int:
        return SharedRows.words(self.rows, self.shape.head_dim) if self.shape.rotated else 0

    def _words(self, stages: int) -> int:
        plain = SumSlots.words(self.warps, self.rows, self.shape.head_dim) if self.policy.segmented else 0
        words = self._ring_words(stages) + self._row_words() + -(-plain // 4) * 4
        return words + TrellisTables.words(self.codecs)

    def _stages(self, wanted: int) -> int:
        """As many as asked for, or as fit the shared memory of a block (fewer warps where not one does)."""
        wanted = min(wanted, self.columns) if self.policy.center else wanted  # see ``TileCentres``
        while self.warps > 1 and 4 * self._words(1) > self.limit:
            self.warps //= 2
        return max(n for n in range(1, wanted + 1) if n == 1 or 4 * self._words(n) <= self.limit)

    def _two_blocks(self) -> bool:
        """Whether a multiprocessor has registers and shared memory for two blocks."""
        return self.resident >= 2 and 2 * (4 * self._words(self.stages) + RESERVED) <= self.limit + RESERVED

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
            row_blocks = self._row_blocks(splits)
            splits = splits + row_blocks
            self.partials = Partials(batch * self.streams, splits, self.rows, shape.head_dim)
            with ExitStack() as stack:
                # Streams first: a sequence's blocks with rows come last then, and so do not take a multiprocessor from
                # blocks with tiles (where they did, 1 × 131,072 took 64 µs instead of 46).
                sizes = {"x": self.streams, "y": splits, "z": batch}
                place = [stack.enter_context(T.launch_thread(f"blockIdx.{axis}", sizes[axis])) for axis in sizes]
                thread = stack.enter_context(T.launch_thread("threadIdx.x", 32 * self.warps))
                if self.resident:
                    stack.enter_context(T.attr({"tirx.launch_bounds_min_blocks_per_sm": self.resident}))
                self._block([i32(index) for index in place], thread, splits, row_blocks)
        return shape.attach(builder.get())

    def _row_blocks(self, splits: Expr) -> Expr:
        """Blocks more per stream for the rows in 16 bits, if all fit; else warps have rows besides their tiles."""
        if not self.policy.segmented or not self.apart:
            return tir.const(0, "int64")
        wanted = tir.const(self.apart, "int64")
        fit = self.batch * self.streams * (splits + wanted) <= self.blocks
        return tir.Select(tir.And(splits > 1, fit), wanted, tir.const(0, "int64"))

    def _block(self, index: list[Expr], thread: Expr, splits: Expr, row_blocks: Expr) -> None:
        """The block of a (stream of a sequence, split, sequence)."""
        counts = scalar(splits.astype("int32")), scalar(row_blocks.astype("int32"))
        self.place = place = self._place(index, counts, thread)
        self.shared = shared_array(self._words(self.stages), "uint32")
        rows = SharedRows(self.shared, self._ring_words(self.stages), *place.sizes, *place.threads)
        turns = self.rotations or (None, None)
        output = DecodeOutput(place, self.codecs[1], self.out, rows, turns[1], self.partials, self.arrivals)
        queries = DecodeQueries(place, self.codecs[0], self.q, rows, turns[0])
        # What follows may read its weights beside this kernel. This one does not start early itself: blocks that wait
        # would stand where others of its own predecessor's should, and its share of what they save is small.
        let_next_start(self.lets_start)
        # Asked for first, since nothing else needs to be known: the sequence's length and its tiles come meanwhile.
        length = scalar(self.lengths[place.b])
        stored = scalar(self.arrays[-1][place.b]) if self.policy.segmented else None
        make_ready = queries.ask()
        ring = self._ring()
        ring.prepare()
        oldest = scalar(tir.max(length - self.shape.window, i32(0)) if self.shape.window else i32(0))
        packed = scalar(self._packed(length, stored))
        tiles = self._tiles(ring, oldest, packed)
        plain = self._plain((oldest, packed, length)) if self.policy.segmented else None
        make_ready()
        if plain is not None:
            plain.attend(queries)
        queries.start(tiles.keys)
        tiles.stream()
        block_sync()  # the warps have read all of their tiles
        own = SumSlots(self.shared, 0, self.warps, *place.sizes)
        own.put(tiles.weights, place.warp, place.lane, tiles.place)
        others = None if plain is None else (plain.slots, plain.slots_in_use)
        output.finish(own, tiles.values.scale, others)

    def _place(self, index: list[Expr], splits: tuple[Expr, Expr], thread: Expr) -> DecodePlace:
        stream, split, b = index
        head, head_block = scalar(stream // self.head_blocks), scalar(stream % self.head_blocks)
        number, lane, warp = scalar(b * self.streams + stream), scalar(thread % WARP), scalar(thread // WARP)
        where = b, head, head_block, number, split, *splits
        return DecodePlace(self.shape, self.rows, self.warps, *where, thread, lane, warp)

    def _plain(self, bounds: tuple[Expr, Expr, Expr]) -> PlainShare:
        """Begin to bring the warp's share of the 16-bit rows nearer."""
        slots = SumSlots(self.shared, self._ring_words(self.stages) + self._row_words(), self.warps, *self.place.sizes)
        rows = PlainRows(self.arrays[-2], (self.place.b, self.place.head), self.policy, self.shape.head_dim)
        return PlainShare(self.place, rows, slots, bounds)

    def _ring(self) -> TileRing:
        """The warp's ring of tiles."""
        first = self.stages * self.tile_words
        barrier = self.warps * first
        warp, lane = self.place.warp, self.place.lane
        places = scalar(warp * first), scalar(barrier + warp * (2 * self.stages))
        # One tile in flight per warp is faster where most multiprocessors have two blocks, if tiles are not too small.
        depth: Expr = i32(self.stages)
        if self.bulk and self._two_blocks() and 2 * self.warps * self.layout.tile_bytes >= ENOUGH:
            blocks = i32(self.batch * self.streams) * self.place.splits
            depth = scalar(tir.Select(2 * blocks > 3 * self.multiprocessors, i32(1), depth))
        once = self.head_blocks == 1
        return TileRing(self.shared, *places, self.stages, self.tile_words, lane, self.bulk, depth, once)

    def _centres(self) -> TileCentres | None:
        """The warp's place for centres, behind all rings."""
        if not self.policy.center:
            return None
        warp, rings = self.place.warp, self.warps * self.stages * (self.tile_words + 2)
        first = rings + warp * TileCentres.words(self.shape.head_dim, self.columns)
        where = self.place.b, self.place.head
        return TileCentres(self.shared, first, self.arrays[1], where, self.place.lane, self.bulk, self.columns)

    def _tiles(self, ring: TileRing, oldest: Expr, packed: Expr) -> PackedStream:
        """Begin to copy the warp's tiles."""
        place, shape = self.place, self.shape
        tables = TrellisTables(self.codecs, self.shared, self._words(self.stages) - TrellisTables.words(self.codecs))
        sides = ring, place.narrow, tables, shape.wraps, self._centres()
        tiles = PackedStream(self.codecs, self.layout, self.policy, *sides)
        behind = scalar(oldest - self.policy.sinks)
        first = scalar(tir.max(behind, i32(0)) // TOKENS + place.split * self.warps + place.warp)
        if self.policy.segmented:
            packed = scalar(tir.Select(place.has_tiles, packed, i32(0)))
        share = Share(first, scalar(place.step), packed, behind)
        tiles.begin(self.arrays[0], (place.b, place.head), share)
        if tables.books:
            with T.If(place.has_tiles), T.Then():
                tables.fill(*place.threads)
        return tiles

    def _packed(self, length: Expr, stored: Expr | None) -> Expr:
        """How many tokens behind the sinks are in tiles; ``stored`` says so where there are 16-bit rows too."""
        tokens = length if stored is None else tir.min(stored, tir.max(length - self.policy.sinks, i32(0)))
        return tokens if self.shape.wraps else tir.min(tokens, i32(self.tiles * TOKENS))
