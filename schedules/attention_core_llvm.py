"""Attention of a block of query rows over tiles of 32 tokens, on CPU vectors: the part that knows no format.

Keys and values of a tile come as scratch arrays in the order of ``tile_values_llvm`` (lane (g, t) of a vector holds a
quarter of four tokens' dims, or of four dims' tokens). So scores and outputs are first accumulated per lane and
summed over t afterwards; queries and weights are replicated over g to match. Softmax is online, in base 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.online_softmax import MASKED
from rotquant_tvm.ops.soft_cap import LOG2E, soft_cap

from .vector_ops import LANES, across, cast, exp2, lane_numbers, lanes, pick, register, splat, sum_of_fours

Expr = Any


def row_block(rows: int, registers: int) -> tuple[int, int]:
    """(rows padded, rows per register block): two accumulators a row must fit the registers."""
    most = 6 if registers >= 32 else 3
    fitting = [n for n in range(1, most + 1) if rows % n == 0]
    if rows <= most or fitting[-1] * 2 > most:
        return rows, fitting[-1]
    block = most - most % 2 if most > 3 else 2
    return -(-rows // block) * block, block


class AttentionCore:
    """Scratch and loops for ``rows`` queries of ``head_dim``; create it where its buffers should be allocated."""

    def __init__(
        self, rows: int, head_dim: int, registers: int, centred: bool = False, softcap: float | None = None
    ) -> None:
        """``centred``: some tiles' keys stand off a centre, whose scores ``take_centre`` prepares.

        ``softcap`` bounds the scores, centres included (None: not).
        """
        self.head_dim, self.softcap = head_dim, softcap
        self.rows, self.block = row_block(rows, registers)

        def alloc(vectors: int) -> Any:
            return T.alloc_buffer((vectors * LANES,), "float32")

        self.query = alloc(self.rows * head_dim // 4)
        self.keys, self.values = alloc(head_dim * 2), alloc(head_dim * 2)
        self.sums = alloc(self.rows * 8)
        self.weights = alloc(self.rows * 8)
        self.output = alloc(self.rows * head_dim // 4)
        self.peak, self.total, self.decay = alloc(self.rows), alloc(self.rows), alloc(self.rows)
        self.gain_k, self.gain_v = alloc(2), alloc(2)
        self.centre, self.offset = (alloc(head_dim // 4), alloc(self.rows)) if centred else (None, None)

    def start(self, load_query: Callable[[Expr, Expr], Expr], real: Callable[[Expr], Expr], scale: float) -> None:
        """Load the queries: ``load_query(row, dim)`` gives float32 dims dim … dim+15; rows not ``real`` become 0."""
        with T.serial(0, self.rows) as row:
            with T.serial(0, self.head_dim // 16) as sixteen:
                part = register()
                T.buffer_store(part, splat(0.0), [lanes(0)])
                with T.If(real(row)), T.Then():
                    T.buffer_store(part, load_query(row, sixteen * 16) * splat(scale * LOG2E), [lanes(0)])
                for e in range(4):
                    value = pick([part[lanes(0)]], lambda k, e=e: 4 * (k % 4) + e)
                    slot = (row * (self.head_dim // 16) + sixteen) * 4 + e
                    T.buffer_store(self.query, value, [lanes(slot * LANES)])
            T.buffer_store(self.peak, splat(MASKED), [lanes(row * LANES)])
            T.buffer_store(self.total, splat(0.0), [lanes(row * LANES)])
        with T.serial(0, self.rows * self.head_dim // 4) as slot:
            T.buffer_store(self.output, splat(0.0), [lanes(slot * LANES)])

    def unit_gains(self) -> None:
        """For keys and values whose gains are 1."""
        for gains in (self.gain_k, self.gain_v):
            for s in range(2):
                T.buffer_store(gains, splat(1.0), [lanes(LANES * s)])

    def take_centre(self, load: Callable[[Expr], Expr]) -> None:
        """Score the centre of the tiles to come: ``load(dim)`` gives its float32 dims dim … dim+15."""
        with T.serial(0, self.head_dim // 16) as sixteen:
            part = register()
            T.buffer_store(part, load(sixteen * 16), [lanes(0)])
            for e in range(4):
                value = pick([part[lanes(0)]], lambda k, e=e: 4 * (k % 4) + e)
                T.buffer_store(self.centre, value, [lanes((sixteen * 4 + e) * LANES)])
        with T.serial(0, self.rows) as row:
            total = register()
            T.buffer_store(total, splat(0.0), [lanes(0)])
            with T.serial(0, self.head_dim // 4) as slot:
                query = self.query[lanes((row * (self.head_dim // 4) + slot) * LANES)]
                T.buffer_store(total, total[lanes(0)] + query * self.centre[lanes(slot * LANES)], [lanes(0)])
            across(total, lambda a, b: a + b)
            # Every product stands in four lanes.
            T.buffer_store(self.offset, total[lanes(0)] * splat(0.25), [lanes(row * LANES)])

    def no_centre(self) -> None:
        """For tiles whose keys are whole."""
        if self.offset is not None:
            with T.serial(0, self.rows) as row:
                T.buffer_store(self.offset, splat(0.0), [lanes(row * LANES)])

    def tile(self, first: Expr, oldest: Callable[[Expr], Expr], newest: Callable[[Expr], Expr]) -> None:
        """Take in the tile in ``keys``, ``values`` and the gains; its tokens stand at positions ``first`` … first+31.

        Row r attends to positions ``oldest(r)`` … ``newest(r)`` (int32).
        """
        self._scores()
        with T.serial(0, self.rows) as row:
            self._softmax(row, first, oldest(row), newest(row))
        self._accumulate()

    def _scores(self) -> None:
        quarter = self.head_dim // 4
        with T.serial(0, 4) as octet, T.serial(0, self.rows // self.block) as block:
            sums = register(2 * self.block)
            for n in range(2 * self.block):
                T.buffer_store(sums, splat(0.0), [lanes(LANES * n)])
            with T.serial(0, quarter) as step:
                for r in range(self.block):
                    query = self.query[lanes(((block * self.block + r) * quarter + step) * LANES)]
                    for s in range(2):
                        at = lanes(LANES * (2 * r + s))
                        key = self.keys[lanes(((octet * quarter + step) * 2 + s) * LANES)]
                        T.buffer_store(sums, sums[at] + query * key, [at])
            for r in range(self.block):
                for s in range(2):
                    slot = (block * self.block + r) * 8 + octet * 2 + s
                    T.buffer_store(self.sums, sums[lanes(LANES * (2 * r + s))], [lanes(slot * LANES)])

    def _softmax(self, row: Expr, first: Expr, oldest: Expr, newest: Expr) -> None:
        """Weights of one row, its new peak and how much its earlier sums shrink."""
        score, peak, mine = register(2), register(), lanes(row * LANES)
        low, high = splat(oldest - first), splat(newest - first)
        tokens = [lane_numbers() + splat(LANES * s, "int32") for s in range(2)]
        inside = [tir.And(low <= token, token <= high) for token in tokens]
        for s in range(2):
            value = sum_of_fours(self.sums, row * 8 * LANES + 64 * s) * self.gain_k[lanes(LANES * s)]
            if self.offset is not None:
                value = value + self.offset[mine]
            if self.softcap:
                value = self._capped(value)
            T.buffer_store(score, tir.Select(inside[s], value, splat(MASKED)), [lanes(LANES * s)])
        T.buffer_store(peak, tir.max(score[lanes(0)], score[lanes(LANES)]), [lanes(0)])
        across(peak, tir.max)
        T.buffer_store(peak, tir.max(peak[lanes(0)], self.peak[mine]), [lanes(0)])
        T.buffer_store(self.decay, exp2(self.peak[mine] - peak[lanes(0)]), [mine])
        T.buffer_store(self.peak, peak[lanes(0)], [mine])
        for s in range(2):
            at = lanes(LANES * s)
            T.buffer_store(score, tir.Select(inside[s], exp2(score[at] - peak[lanes(0)]), splat(0.0)), [at])
        T.buffer_store(
            self.total, self.total[mine] * self.decay[mine] + (score[lanes(0)] + score[lanes(LANES)]), [mine]
        )
        for s in range(2):
            at = lanes(LANES * s)
            T.buffer_store(score, score[at] * self.gain_v[at], [at])
        vectors = [score[lanes(0)], score[lanes(LANES)]]
        for x in range(2):
            for e in range(4):
                weight = pick(vectors, lambda k, x=x, e=e: 16 * x + 8 * (e // 2) + 2 * (k % 4) + e % 2)
                T.buffer_store(self.weights, weight, [lanes((row * 8 + x * 4 + e) * LANES)])

    def _capped(self, score: Expr) -> Expr:
        """The score capped; it passes through a register, since an expression would be computed at each use."""
        part = register()
        T.buffer_store(part, score, [lanes(0)])
        return soft_cap(part[lanes(0)], self.softcap, exp2, splat)

    def _accumulate(self) -> None:
        quarter = self.head_dim // 4
        with T.serial(0, quarter) as slot:
            values = register(8)
            for n in range(8):
                T.buffer_store(values, self.values[lanes((slot * 8 + n) * LANES)], [lanes(LANES * n)])
            with T.serial(0, self.rows) as row:
                at = lanes((row * quarter + slot) * LANES)
                total = self.output[at] * self.decay[lanes(row * LANES)]
                for n in range(8):
                    total = total + self.weights[lanes((row * 8 + n) * LANES)] * values[lanes(LANES * n)]
                T.buffer_store(self.output, total, [at])

    def finish(self, row: Expr, normalize: bool, store: Callable[[Expr, Expr], None]) -> None:
        """Sum a row's output and hand it over: ``store(dim, vector)`` for dims dim … dim+15.

        The row's ``total`` is summed over its lanes; with ``normalize`` the output is divided by it.
        """
        total, mine = register(), lanes(row * LANES)
        T.buffer_store(total, self.total[mine], [lanes(0)])
        across(total, lambda a, b: a + b)
        T.buffer_store(self.total, total[lanes(0)], [mine])
        with T.serial(0, self.head_dim // 16) as sixteen:
            value = sum_of_fours(self.output, (row * (self.head_dim // 4) + sixteen * 4) * LANES)
            if normalize:
                value = value / tir.max(total[lanes(0)], splat(1e-37))
            store(sixteen * 16, value)


def wide(buffer: Any, index: list[Expr], dim: Expr) -> Expr:
    """Sixteen elements of a float16 or float32 buffer from ``dim`` on, as float32."""
    return cast(buffer[(*index, lanes(dim))], "float32")
