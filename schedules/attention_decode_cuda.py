"""Decode attention on packed K and V for GPUs: the tensor-core form of ``ops.attention_decode``, in one launch.

A thread block serves one stream (sequence, kv head, up to eight query heads of its group) and one split of its tokens.
Every warp reads tiles of its own (``packed_stream_cuda``); the codes go from memory to the tensor cores as they are,
through a table lookup in registers. The warps' results are merged in the block, the splits' by the block that arrives
last. The 16-bit segments have a block of their own, behind all the others.
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

from .cuda_ops import Registers, f32, half2, i32, load_words, scalar, shared_array
from .cuda_target import dynamic_shared_memory, has_bulk_copies, multiprocessors
from .decode_softmax_cuda import Weights, merge_warps, merge_words
from .knobs import chosen_knobs
from .merge_splits_cuda import Partials, arrives_last, normalized
from .packed_stream_cuda import PackedStream, Share, integer
from .plain_rows_cuda import PlainRows
from .query_rotation_cuda import SharedRows, few_taps
from .tile_ring_cuda import TileRing

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {
    "warps": (4, 8, 16),
    "stages": (1, 2, 3, 4),
    "blocks": (132, 264, 396, 528),
    "resident": (0, 2, 3, 4),
}
"""Warps per block; tiles in flight per warp; blocks that a launch aims at; blocks per multiprocessor that the compiler
must leave registers for (0: no matter)."""
FORMATS = ("lloyd", "half", "linear")
ARRIVALS = 1 << 16


def attention_decode_cuda(func: tir.PrimFunc, target: tvm.target.Target) -> tir.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``."""
    shape = SiteShape.of(func)
    return None if shape is None else build(shape, target, **chosen_knobs(func))


def build(shape: SiteShape, target: tvm.target.Target, **knobs: int) -> tir.PrimFunc | None:
    """Build the kernel; None for formats and soft-capped scores, which it lacks.

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
    return _Kernel(shape, target, knobs).build()


def default_knobs(shape: SiteShape, target: tvm.target.Target) -> dict[str, int]:
    """What the rule chooses: as many warps as a multiprocessor has registers for, in one wave of blocks."""
    if shape.group <= 4 and shape.head_dim <= 128:
        warps, resident = 8, 2  # at most 128 registers a lane
    else:
        warps, resident = 4, 3 if shape.head_dim <= 128 else 2
    return {"warps": warps, "stages": 2, "blocks": resident * multiprocessors(target), "resident": resident}


class _Kernel:
    def __init__(self, shape: SiteShape, target: tvm.target.Target, chosen: dict[str, int]) -> None:
        knobs = default_knobs(shape, target) | chosen
        self.shape, self.policy = shape, shape.cache_policy
        self.codecs = shape.codecs()
        self.layout = TileLayout(self.codecs[0].format, self.codecs[1].format, shape.head_dim)
        self.warps, self.blocks = knobs["warps"], knobs["blocks"]
        # A choice of warps without one of blocks is not held to the rule's registers.
        self.resident = knobs["resident"] if "warps" not in chosen or "resident" in chosen else 0
        self.head_blocks = -(-shape.group // 8)
        self.rows = -(-shape.group // self.head_blocks)
        self.streams = shape.kv_heads * self.head_blocks
        self.narrow = self.rows <= 4
        self.bulk = has_bulk_copies(target)
        self.limit = dynamic_shared_memory(target)
        self.tile_words = self.layout.tile_bytes // 4
        self.stages = self._stages(knobs["stages"])
        self.batch, self.tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")

    def _ring_words(self, stages: int) -> int:
        """Words of the warps' rings, or of what takes their place at the end."""
        rings = self.warps * stages * (self.tile_words + 2)
        sizes = self.rows, self.shape.head_dim
        return -(-max(rings, merge_words(self.warps, *sizes), Partials.words(*sizes, 32 * self.warps)) // 4) * 4

    def _words(self, stages: int) -> int:
        rows = SharedRows.words(self.rows, self.shape.head_dim) if self.shape.rotated else 0
        return self._ring_words(stages) + rows

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
            # Enough blocks to fill the GPU once, but two tiles for each warp (one where tiles are large): what another
            # split costs in the merge is about what a tile takes.
            least = self.warps * (2 if self.layout.tile_bytes <= 8192 else 1)
            most = (self.tiles + (least - 1)) // least
            plain = 1 if self.policy.segmented else 0
            splits = tir.min(self.blocks // (batch * self.streams) - plain, most)
            splits = tir.max(splits, tir.const(1, "int64"))
            parts = splits + plain
            self.partials = Partials(batch * self.streams, parts, self.rows, shape.head_dim)
            with T.launch_thread("blockIdx.x", batch * self.streams * parts) as block:
                with T.launch_thread("threadIdx.x", 32 * self.warps) as thread:
                    if self.resident:
                        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": self.resident}):
                            self._block(block, thread, (splits, parts))
                    else:
                        self._block(block, thread, (splits, parts))
        return shape.attach(builder.get())

    def _block(self, block: Expr, thread: Expr, counts: tuple[Expr, Expr]) -> None:
        self.thread = thread
        self.lane, self.warp = scalar(thread % 32), scalar(thread // 32)
        splits, self.parts = (scalar(count.astype("int32")) for count in counts)
        self.shared = shared_array(self._words(self.stages), "uint32")
        streams = scalar(i32(self.batch * self.streams))
        self.stream, part = scalar(i32(block) % streams), scalar(i32(block) // streams)
        self.b = scalar(self.stream // self.streams)
        self.head = scalar(self.stream % self.streams // self.head_blocks)
        self.head_block = scalar(self.stream % self.head_blocks)
        self.rotated = SharedRows(
            self.shared, self._ring_words(self.stages), self.rows, self.shape.head_dim, thread, 32 * self.warps
        )
        length = scalar(self.lengths[self.b])
        oldest = scalar(tir.max(length - self.shape.window, i32(0)) if self.shape.window else i32(0))
        packed = scalar(self._packed(length))
        if not self.policy.segmented:
            self._tiles(part, splits, (oldest, packed))
            return
        with T.If(part < splits):
            with T.Then():
                self._tiles(part, splits, (oldest, packed))
            with T.Else():
                rows = PlainRows(self.arrays[-2], (self.b, self.head), self.policy, self.shape.head_dim)
                rows.keys.start(self._queries(), self.shape.scale * LOG2E)
                rows.stream(self.lane, self.warp, self.warps, (oldest, packed, length))
                self._finish(rows.weights, lambda j, half: rows.place(self.lane, j, half), part)

    def _tiles(self, part: Expr, splits: Expr, bounds: tuple[Expr, Expr]) -> None:
        oldest, packed = bounds
        ring = TileRing(
            self.shared,
            scalar(self.warp * (self.stages * self.tile_words)),
            scalar(self.warps * self.stages * self.tile_words + self.warp * (2 * self.stages)),
            self.stages,
            self.tile_words,
            self.lane,
            self.bulk,
        )
        tiles = PackedStream(self.codecs, self.layout, self.policy, ring, self.narrow, self.shape.wraps)
        behind = scalar(oldest - self.policy.sinks)
        first = scalar(tir.max(behind, i32(0)) // TOKENS + part * self.warps + self.warp)
        step = scalar(splits * self.warps)
        count = scalar(tir.max((packed + (TOKENS - 1)) // TOKENS - first + (step - 1), i32(0)) // step)
        tiles.begin(self.arrays[0], (self.b, self.head), Share(first, step, count, packed, behind))
        tiles.keys.start(self._queries(), self.shape.scale * LOG2E)
        tiles.stream(self.arrays[1] if self.policy.center else None)
        self._finish(tiles.weights, lambda j, half: 16 * j + 8 * half + self.lane // 4, part)

    def _packed(self, length: Expr) -> Expr:
        stored = length
        if self.policy.segmented:
            stored = tir.min(self.arrays[-1][self.b], tir.max(length - self.policy.sinks, i32(0)))
        return stored if self.shape.wraps else tir.min(stored, i32(self.tiles * TOKENS))

    def _query_head(self, row: Expr) -> Expr:
        """The query head of a row; rows beyond the group repeat its last head, and are never stored."""
        return self.head * self.shape.group + tir.min(self.head_block * self.rows + row, i32(self.shape.group - 1))

    def _queries(self) -> Any:
        """Loads the lane's query elements, rotated if the kernel takes raw queries."""
        row = tir.min(self.lane // 4 % 4 if self.narrow else self.lane // 4, i32(self.rows - 1))
        if self.shape.rotated:
            return self._rotated_queries(scalar(row))
        query_head = scalar(self._query_head(row))

        def load(step: int) -> list[Expr]:
            index = [self.b, 0, query_head, 16 * step + 4 * (self.lane % 4)]
            if self.shape.dtype == "float32":
                values = Registers(4, "float32")
                load_words(values, 0, self.q, index, 4, "global")
                return list(values)
            words = Registers(2)
            load_words(words, 0, self.q, index, 2, "global")
            return [*half2(words[0]), *half2(words[1])]

        return load

    def _rotated_queries(self, row: Expr) -> Any:
        rows = self.rotated
        rows.each(lambda r, dim: rows.put(r, dim, f32(self.q[self.b, 0, self._query_head(r), dim])))
        rows.rotate(self.codecs[0].rotation.structure, self.rotations[0])

        def load(step: int) -> list[Expr]:
            values = Registers(4, "float32")
            load_words(values, 0, self.shared, [rows.at(row, 16 * step + 4 * (self.lane % 4))], 4, "shared")
            return list(values)

        return load

    def _finish(self, weights: Weights, place: Any, part: Expr) -> None:
        """Merge the warps, then the splits; store the output."""
        where, rows = (self.stream, part), self.rotated

        def put(row: Expr, dim: Expr, value: Expr) -> None:
            rows.put(row, dim, value) if self.shape.rotated else self._store(row, dim, value)

        def store(row: Expr, dim: Expr, value: Expr, reference: Expr, total: Expr) -> None:
            with T.If(self.parts == 1):
                with T.Then():
                    put(row, dim, normalized(value, total))
                with T.Else():
                    self.partials.store(where, row, dim, (value, reference, total))

        merge_warps(
            weights, self.shared, self.thread, (self.warps, self.rows, self.shape.head_dim), place, store
        )
        last = Registers(1, "int32")
        last[0] = i32(1)
        with T.If(self.parts > 1), T.Then():
            arrived = arrives_last(self.arrivals, self.stream, self.parts, self.shared, self.thread)
            last[0] = i32(arrived)
            with T.If(arrived), T.Then():
                self.partials.merge(self.stream, self.parts, (self.thread, 32 * self.warps), self.shared, put)
        if self.shape.rotated:
            with T.If(last[0] == 1), T.Then():
                rows.rotate(self.codecs[1].inverse_rotation.structure, self.rotations[1])
                rows.each(lambda row, dim: self._store(row, dim, rows.get(row, dim)))

    def _store(self, row: Expr, dim: Expr, value: Expr) -> None:
        with T.If(self.head_block * self.rows + row < self.shape.group), T.Then():
            T.buffer_store(self.out, value.astype(self.shape.dtype), [self.b, 0, self._query_head(row), dim])
