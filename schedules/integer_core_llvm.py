"""Decode attention of a group of queries over packed tiles in integers, for CPUs with dot products of bytes.

Codebooks lie on an int8 grid. So keys and values stay bytes (``tile_bytes_llvm``), and what they are multiplied with,
queries and softmax weights, becomes integers of 15 bits and a sign in two int8 parts: 128 products in two instructions
where float32 takes eight, and a lookup for 64 codes instead of 16.

Several tiles make a block: their scores are taken first, then the softmax of them all, then their values, so that the
weights of a block share a scale and the sums of its values stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.online_softmax import MASKED
from rotquant_tvm.ops.soft_cap import LOG2E, soft_cap

from .byte_ops_llvm import byte_dot
from .integer_parts_llvm import LARGEST, cleaned, fractions, largest_magnitude, store_parts
from .tile_bytes_llvm import GRID_OFFSET
from .vector_ops import (
    LANES,
    across,
    cast,
    exp2,
    lane_numbers,
    lanes,
    register,
    side_by_side,
    splat,
    sum_of_fours,
)

Expr = Any


class IntegerCore:
    """Scratch and loops for ``rows`` queries of ``head_dim``; create it where its buffers should be allocated.

    A block has up to ``tiles`` tiles. ``centred``: scores get ``offset`` added, which ``take_centre`` prepares.
    ``softcap`` bounds the scores (None: not).
    """

    def __init__(
        self,
        rows: int,
        head_dim: int,
        tiles: int,
        target: tvm.target.Target,
        registers: int,
        centred: bool = False,
        softcap: float | None = None,
    ) -> None:
        self.head_dim, self.tiles, self.target, self.softcap = head_dim, tiles, target, softcap
        most = 5 if registers >= 32 else 1  # four sums a row must fit the registers
        self.blocks = -(-rows // most)
        self.block = -(-rows // self.blocks)
        self.rows = self.blocks * self.block

        self.centred = centred
        rows, sixteens = self.rows, head_dim // 16 if centred else 0
        sizes = {
            "uint32": (rows * head_dim // 8, head_dim // 2, tiles * head_dim // 2, tiles * rows * 4),
            "int32": (rows * 8, rows, rows),
            "float32": (tiles * rows * 2, rows * head_dim // 4, 2, 2 * tiles, rows * sixteens, sixteens, *[rows] * 9),
        }
        buffers = side_by_side(*((size, dtype) for dtype, counts in sizes.items() for size in counts))
        self.query, self.keys, self.values, self.weights = buffers[:4]
        self.sums, self.query_start, self.weight_start = buffers[4:7]
        self.scores, self.output, self.gain_k, self.gain_v, self.plain, self.centre = buffers[7:13]
        self.query_scale, self.weight_scale, self.high, self.peak, self.total = buffers[13:18]
        self.decay, self.largest, self.offset, self.poison = buffers[18:]

    def start(self, load_query: Callable[[Expr, Expr], Expr], real: Callable[[Expr], Expr], scale: float) -> None:
        """Load the queries: ``load_query(row, dim)`` gives float32 dims dim … dim+15; rows not ``real`` become 0."""
        sixteens = self.head_dim // 16
        with T.serial(0, self.rows) as row:
            mine, part = lanes(row * LANES), [register() for _ in range(sixteens)]
            for vector in part:
                T.buffer_store(vector, splat(0.0), [lanes(0)])
            with T.If(real(row)), T.Then():
                for n, vector in enumerate(part):
                    T.buffer_store(vector, load_query(row, n * 16), [lanes(0)])
            T.buffer_store(self.poison, cleaned(part), [mine])
            inverse = register()
            T.buffer_store(inverse, splat(LARGEST) / largest_magnitude(part), [lanes(0)])
            T.buffer_store(self.query_scale, splat(scale * LOG2E) / inverse[lanes(0)], [mine])
            whole = register(1, "int32")
            T.buffer_store(whole, splat(0, "int32"), [lanes(0)])
            for n, vector in enumerate(part):
                number = register(1, "int32")
                T.buffer_store(number, cast(tir.nearbyint(vector[lanes(0)] * inverse[lanes(0)]), "int32"), [lanes(0)])
                T.buffer_store(whole, whole[lanes(0)] + number[lanes(0)], [lanes(0)])
                store_parts(self.query, row * 2 * sixteens + n, sixteens, number, lambda k: k % 16)
                if self.centred:
                    at = lanes((row * sixteens + n) * LANES)
                    T.buffer_store(self.plain, vector[lanes(0)] * splat(scale * LOG2E), [at])
            across(whole, lambda a, b: a + b)
            T.buffer_store(self.query_start, whole[lanes(0)] * splat(-GRID_OFFSET // 4, "int32"), [mine])
            T.buffer_store(self.peak, splat(MASKED), [mine])
            T.buffer_store(self.total, splat(0.0), [mine])
        with T.serial(0, self.rows * self.head_dim // 4) as slot:
            T.buffer_store(self.output, splat(0.0), [lanes(slot * LANES)])

    def take_centre(self, load: Callable[[Expr], Expr]) -> None:
        """Score the centre of the tiles to come: ``load(dim)`` gives its float32 dims dim … dim+15."""
        with T.serial(0, self.head_dim // 16) as n:
            T.buffer_store(self.centre, load(n * 16), [lanes(n * LANES)])
        with T.serial(0, self.rows) as row:
            total = register()
            T.buffer_store(total, splat(0.0), [lanes(0)])
            with T.serial(0, self.head_dim // 16) as n:
                query = self.plain[lanes((row * (self.head_dim // 16) + n) * LANES)]
                T.buffer_store(total, total[lanes(0)] + query * self.centre[lanes(n * LANES)], [lanes(0)])
            across(total, lambda a, b: a + b)
            T.buffer_store(self.offset, total[lanes(0)], [lanes(row * LANES)])

    def start_block(self) -> None:
        """Begin a block."""
        with T.serial(0, self.rows) as row:
            T.buffer_store(self.high, splat(MASKED), [lanes(row * LANES)])

    def score(self, tile: Expr, first: Expr, oldest: Expr, newest: Expr) -> None:
        """Score ``keys`` as tile number ``tile`` of the block; its tokens stand at positions ``first`` … first+31.

        All rows attend to positions ``oldest`` … ``newest`` (int32). The gains are in ``gain_k``.
        """
        self._dot_keys()
        low, high = splat(oldest - first), splat(newest - first)
        with T.serial(0, self.rows) as row:
            mine = lanes(row * LANES)
            for x in range(2):
                token = lane_numbers() + splat(LANES * x, "int32")
                score = register()
                sums = cast(sum_of_fours(self.sums, (row * 8 + 4 * x) * LANES), "float32")
                value = sums * (self.query_scale[mine] * self.gain_k[lanes(LANES * x)])
                T.buffer_store(score, value + self.offset[mine] if self.centred else value, [lanes(0)])
                if self.softcap:
                    T.buffer_store(score, soft_cap(score[lanes(0)], self.softcap, exp2, splat), [lanes(0)])
                inside = tir.And(low <= token, token <= high)
                T.buffer_store(score, tir.Select(inside, score[lanes(0)], splat(MASKED)), [lanes(0)])
                T.buffer_store(self.scores, score[lanes(0)], [lanes(self._score_at(row, tile, x))])
                T.buffer_store(self.high, tir.max(self.high[mine], score[lanes(0)]), [mine])

    def _score_at(self, row: Expr, tile: Expr, x: int) -> Expr:
        return ((row * self.tiles + tile) * 2 + x) * LANES

    def _dot_keys(self) -> None:
        """Products of the keys with the queries, still apart by the four lanes of a token."""
        steps = self.head_dim // 16
        with T.serial(0, 4) as octet, T.serial(0, self.blocks) as block:
            totals = self._totals(block, self.query_start)
            with T.serial(0, steps) as step:
                for s in range(2):
                    key = self.keys[lanes(((octet * steps + step) * 2 + s) * LANES)]
                    for r in range(self.block):
                        for plane in range(2):
                            at = ((block * self.block + r) * 2 + plane) * steps + step
                            self._add(totals, (s, r, plane), key, self.query[lanes(at * LANES)])
            for s in range(2):
                for r in range(self.block):
                    slot = (block * self.block + r) * 8 + octet * 2 + s
                    T.buffer_store(self.sums, self._joined(totals, s, r), [lanes(slot * LANES)])

    def _totals(self, block: Expr, start: Any) -> list[Any]:
        """Registers for the sums of a block of rows with two vectors; what ``GRID_OFFSET`` adds is taken off."""
        totals = [register(2 * self.block, "int32") for _ in range(2)]
        for s in range(2):
            for r in range(self.block):
                T.buffer_store(totals[s], start[lanes((block * self.block + r) * LANES)], [lanes(2 * r * LANES)])
                T.buffer_store(totals[s], splat(0, "int32"), [lanes((2 * r + 1) * LANES)])
        return totals

    def _add(self, totals: list[Any], which: tuple[int, int, int], values: Expr, weights: Expr) -> None:
        s, r, plane = which
        at = lanes((2 * r + plane) * LANES)
        T.buffer_store(totals[s], byte_dot(totals[s][at], values, weights, self.target), [at])

    def _joined(self, totals: list[Any], s: int, r: int) -> Expr:
        """The sum of both parts."""
        low, high = (totals[s][lanes((2 * r + plane) * LANES)] for plane in range(2))
        return low + (high << splat(8, "int32"))

    def finish_block(self, count: Expr) -> None:
        """Take in the block: softmax over its ``count`` tiles, then their ``values`` with the gains in ``gain_v``."""
        # Each step for all rows, so that the chain of one row's step runs beside those of the others.
        for step in (self._raise_peak, self._exponentials, self._scale_weights, self._round_weights):
            with T.serial(0, self.rows) as row:
                step(row, count)
        self._accumulate(count)

    def _raise_peak(self, row: Expr, _count: Expr) -> None:
        mine, peak = lanes(row * LANES), register()
        T.buffer_store(peak, self.high[mine], [lanes(0)])
        across(peak, tir.max)
        T.buffer_store(peak, tir.max(peak[lanes(0)], self.peak[mine]), [lanes(0)])
        T.buffer_store(self.decay, exp2(self.peak[mine] - peak[lanes(0)]), [mine])
        T.buffer_store(self.peak, peak[lanes(0)], [mine])

    def _exponentials(self, row: Expr, count: Expr) -> None:
        """Make weights of a row's scores, times the gains of the values."""
        mine, total, largest = lanes(row * LANES), register(), register()
        T.buffer_store(total, self.total[mine] * self.decay[mine], [lanes(0)])
        T.buffer_store(largest, splat(1e-30), [lanes(0)])
        with T.serial(0, count) as tile:
            for x in range(2):
                at, weight = lanes(self._score_at(row, tile, x)), register()
                seen = self.scores[at] > splat(MASKED / 2)
                raised = exp2(self.scores[at] - self.peak[mine])
                T.buffer_store(weight, tir.Select(seen, raised, splat(0.0)), [lanes(0)])
                T.buffer_store(total, total[lanes(0)] + weight[lanes(0)], [lanes(0)])
                gained = weight[lanes(0)] * self.gain_v[lanes((tile * 2 + x) * LANES)]
                T.buffer_store(weight, tir.Select(seen, gained, splat(0.0)), [lanes(0)])
                T.buffer_store(self.scores, weight[lanes(0)], [at])
                T.buffer_store(largest, tir.max(largest[lanes(0)], tir.abs(weight[lanes(0)])), [lanes(0)])
        T.buffer_store(self.total, total[lanes(0)], [mine])
        T.buffer_store(self.largest, largest[lanes(0)], [mine])

    def _scale_weights(self, row: Expr, _count: Expr) -> None:
        mine, largest = lanes(row * LANES), register()
        T.buffer_store(largest, self.largest[mine], [lanes(0)])
        across(largest, tir.max)
        T.buffer_store(self.weight_scale, splat(1 / LARGEST) * largest[lanes(0)], [mine])
        T.buffer_store(self.largest, splat(LARGEST) / largest[lanes(0)], [mine])

    def _round_weights(self, row: Expr, count: Expr) -> None:
        """Make the weights of a row integers."""
        mine, whole = lanes(row * LANES), register(1, "int32")
        T.buffer_store(whole, splat(0, "int32"), [lanes(0)])
        with T.serial(0, count) as tile:
            for x in range(2):
                number = register(1, "int32")
                scaled = self.scores[lanes(self._score_at(row, tile, x))] * self.largest[mine] + fractions(x)
                T.buffer_store(number, cast(tir.floor(scaled), "int32"), [lanes(0)])
                T.buffer_store(whole, whole[lanes(0)] + number[lanes(0)], [lanes(0)])
                first = ((tile * 2 + x) * self.rows + row) * 2
                store_parts(self.weights, first, 1, number, lambda k: 8 * (k % 4 // 2) + 2 * (k // 4 % 4) + k % 2)
        across(whole, lambda a, b: a + b)
        T.buffer_store(self.weight_start, whole[lanes(0)] * splat(-GRID_OFFSET // 4, "int32"), [mine])

    def _accumulate(self, count: Expr) -> None:
        with T.serial(0, self.head_dim // 16) as pair, T.serial(0, 2) as half, T.serial(0, self.blocks) as block:
            totals = self._totals(block, self.weight_start)
            with T.serial(0, count) as tile:
                for x in range(2):
                    for s in range(2):
                        slot = tile * (self.head_dim // 2) + ((pair * 2 + x) * 2 + half) * 2 + s
                        value = self.values[lanes(slot * LANES)]
                        for r in range(self.block):
                            for plane in range(2):
                                at = ((tile * 2 + x) * self.rows + (block * self.block + r)) * 2 + plane
                                self._add(totals, (s, r, plane), value, self.weights[lanes(at * LANES)])
            for s in range(2):
                for r in range(self.block):
                    row = block * self.block + r
                    mine, at = lanes(row * LANES), lanes((row * (self.head_dim // 4) + pair * 4 + half * 2 + s) * LANES)
                    gained = cast(self._joined(totals, s, r), "float32") * self.weight_scale[mine]
                    T.buffer_store(self.output, self.output[at] * self.decay[mine] + gained, [at])

    def finish(self, row: Expr, store: Callable[[Expr, Expr], None]) -> None:
        """Sum a row's output and hand it over: ``store(dim, vector)`` for dims dim … dim+15; sum its ``total``."""
        total, mine = register(), lanes(row * LANES)
        T.buffer_store(total, self.total[mine], [lanes(0)])
        across(total, lambda a, b: a + b)
        T.buffer_store(self.total, total[lanes(0)], [mine])
        with T.serial(0, self.head_dim // 16) as sixteen:
            value = sum_of_fours(self.output, (row * (self.head_dim // 4) + sixteen * 4) * LANES)
            poison = tir.Select(total[lanes(0)] > splat(0.0), self.poison[mine], splat(0.0))
            store(sixteen * 16, value + poison)
