"""The 16-bit segments of a cache in decode attention, on CUDA: sinks and ring, a few rows at a time.

Rows are few, so they need no ring of copies in shared memory: some warps of a stream's blocks read 16 of them each from
global memory, while their first tiles are on the way.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy

from .cuda_ops import Registers, i32, load_words, prmt, scalar, u32
from .decode_scores_cuda import HalfScores
from .decode_softmax_cuda import HIDDEN, Weights
from .decode_values_cuda import HalfValues

Expr = Any


ROWS = 16
"""Rows that a warp takes at a time."""


class PlainRows:
    """Streams the rows of one (sequence, kv head) through ``keys`` and ``weights``."""

    def __init__(self, plain: Any, where: tuple[Expr, Expr], policy: CachePolicy, head_dim: int) -> None:
        self.plain, self.where, self.policy, self.head_dim = plain, where, policy, head_dim
        self.keys, self.values = HalfScores(head_dim), HalfValues(head_dim)
        self.weights = Weights(self.values, ROWS // 4)

    def turns(self, bounds: tuple[Expr, Expr, Expr]) -> Expr:
        """How often 16 rows are taken, for those whose positions are in ``bounds`` = (oldest, packed, stored).

        See ``ops.segments``.
        """
        self._bounds = oldest, packed, stored = bounds
        sinks = self.policy.sinks
        self._first = first = scalar(tir.max(packed, oldest - sinks))
        sink_turns = -(-sinks // ROWS)
        ring_turns = tir.if_then_else(
            stored - sinks > first, (stored - sinks + (ROWS - 1)) // ROWS - first // ROWS, i32(0)
        )
        turns = ring_turns + sink_turns if self.policy.ring else i32(sink_turns)
        self._turns = scalar(tir.if_then_else(stored > 0, turns, i32(0)))  # an empty sequence may have no row at all
        return self._turns

    def stream(self, lane: Expr, begin: Expr, step: Expr) -> None:
        """Take turns ``begin``, ``begin + step``, … of them (``turns``), once the queries are at hand."""
        oldest, _, stored = self._bounds
        first, sinks = self._first, self.policy.sinks
        sink_turns = -(-sinks // ROWS)
        self.weights.start()
        held = scalar(tir.min(stored, i32(sinks)))
        with T.serial(0, (self._turns - begin + (step - 1)) // step) as turn:
            number = scalar(begin + turn * step)
            in_sinks = number < sink_turns
            base = scalar(tir.if_then_else(in_sinks, number * ROWS, (first // ROWS + number - sink_turns) * ROWS))
            low = scalar(tir.if_then_else(in_sinks, oldest, first))
            high = scalar(tir.if_then_else(in_sinks, held, stored - sinks))

            def slot(token: Expr, base: Expr = base, low: Expr = low, high: Expr = high, sink: Expr = in_sinks) -> Expr:
                # A row that is not attended to may never have been written: read one that was.
                at = tir.max(tir.min(tir.max(base + token, low), high - 1), i32(0))
                ring = at % max(1, self.policy.ring) + sinks
                return scalar(tir.if_then_else(sink, tir.min(at, i32(max(sinks - 1, 0))), ring))

            def attended(token: Expr, base: Expr = base, low: Expr = low, high: Expr = high) -> Expr:
                return (base + token >= low) & (base + token < high)

            self._take(lane, slot, attended)

    def _take(self, lane: Expr, slot: Any, attended: Any) -> None:
        g, t = scalar(lane // 4), scalar(lane % 4)
        keys = [self._keys(slot(8 * i + g), t) for i in range(ROWS // 8)]
        values = self._values([slot(8 * pair + 2 * t + u) for pair in range(2) for u in range(2)], g)
        scores = Registers(ROWS // 4, "float32")
        for i, key in enumerate(keys):
            pair = self.keys.octet(lambda step, key=key: key[step])
            for u in range(2):
                scores[2 * i + u] = tir.Select(attended(8 * i + 2 * t + u), pair[u], tir.const(HIDDEN, "float32"))
        weights = self.weights.take(scores, None, lane)

        def fragment(j: int, half: int, x: int, pair: int) -> Expr:
            del x
            chunk, wide = self._chunk(j)
            two = [values[chunk][2 * pair + u][j % 2 if wide else 0] for u in range(2)]
            return prmt(*two, u32(0x7632 if half else 0x5410))

        self.values.add(fragment, weights)

    def _keys(self, row: Expr, t: Expr) -> list[list[Expr]]:
        """The lane's elements of a key: for each step, 16·step + 4t + 0 … 3 as two words."""
        return [self._load(0, row, 16 * step + 4 * t, 2) for step in range(self.head_dim // 16)]

    def _values(self, rows: list[Expr], g: Expr) -> list[list[list[Expr]]]:
        """Of each chunk of 32 dims (16 at an odd end) and each row, the lane's 4 (2) neighbouring elements."""
        chunks = []
        for chunk in range(-(-self.head_dim // 32)):
            wide = 32 * chunk + 32 <= self.head_dim
            start = 32 * chunk + (4 if wide else 2) * g
            chunks.append([self._load(1, row, start, 2 if wide else 1) for row in rows])
        return chunks

    def _chunk(self, j: int) -> tuple[int, bool]:
        """The chunk that block j of 16 dims lies in, and whether it is a whole one."""
        return j // 2, 32 * (j // 2) + 32 <= self.head_dim

    def place(self, lane: Expr, j: int, half: int) -> Expr:
        """The dim that the lane's half of block j is."""
        chunk, wide = self._chunk(j)
        if wide:
            return 32 * chunk + 4 * (lane // 4) + 2 * (j % 2) + half
        return 16 * j + 2 * (lane // 4) + half

    def _load(self, role: int, row: Expr, dim: Expr, words: int) -> list[Expr]:
        target = Registers(words)
        load_words(target, 0, self.plain, [*self.where, role, row, dim], words, "global")
        return list(target)
