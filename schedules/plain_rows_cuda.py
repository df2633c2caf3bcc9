"""The 16-bit segments of a cache in decode attention, on CUDA: sinks and ring, a few rows at a time.

Rows are few, so they need no ring of copies in shared memory: some warps of a stream's blocks, or of blocks of their
own, read 16 of them each from global memory.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy

from .cuda_ops import WARP, Registers, i32, load_words, prmt, ptx, scalar, u32
from .decode_place_cuda import DecodePlace
from .decode_queries_cuda import DecodeQueries
from .decode_scores_cuda import HalfScores
from .decode_softmax_cuda import HIDDEN, SumSlots, Weights
from .decode_values_cuda import HalfValues

Expr = Any


ROWS = 16
"""Rows that a warp takes at a time."""
SECTOR = 16
"""Elements that memory is read by."""


class PlainRows:
    """Streams the rows of one (sequence, kv head) through ``keys`` and ``weights``."""

    def __init__(self, plain: Any, where: tuple[Expr, Expr], policy: CachePolicy, head_dim: int) -> None:
        self.plain, self.where, self.policy, self.head_dim = plain, where, policy, head_dim
        self.keys, self.values = HalfScores(head_dim), HalfValues(head_dim)
        self.weights = Weights(self.values, ROWS // 4)

    def turns(self, bounds: tuple[Expr, Expr, Expr]) -> Expr:
        """How often 16 rows are taken, for those whose positions are in ``bounds`` = (oldest, packed, stored).

        See ``ops.segments``. Rows are numbered from the first sink that is attended to on; the ring's follow.
        """
        oldest, packed, stored = bounds
        sinks = self.policy.sinks
        self._sink = scalar(oldest)
        self._sinks = scalar(tir.max(tir.min(stored, i32(sinks)) - oldest, i32(0)))
        self._count = self._sinks
        if self.policy.ring:
            first = scalar(tir.max(packed, oldest - sinks))
            self._ring = scalar(first % self.policy.ring)
            self._count = scalar(self._sinks + tir.max(stored - sinks - first, i32(0)))
        return scalar((self._count + (ROWS - 1)) // ROWS)

    def approach(self, lane: Expr, turn: Expr) -> None:
        """Begin to bring the rows of a turn into the L2 cache: there are no registers to load them into early."""
        sectors = self.head_dim // SECTOR
        for start in range(0, ROWS * sectors, WARP):
            sector = scalar(tir.min(start + lane, ROWS * sectors - 1))
            row, part = self._slot(turn, sector // sectors), sector % sectors * SECTOR
            for role in range(2):
                ptx("prefetch.global.L2", self.plain.ptr_to([*self.where, role, row, part]))

    def stream(self, lane: Expr, begin: Expr, more: Expr, step: Expr) -> None:
        """Take the turn ``begin`` and ``more`` others, each ``step`` later; the queries are at hand."""
        self.weights.start()
        with T.serial(0, more + 1) as number:
            self._take(lane, scalar(begin + number * step))

    def _slot(self, turn: Expr, token: Expr) -> Expr:
        """Where a row stands."""
        # A row that is not attended to may never have been written: read one that was.
        row = scalar(tir.min(turn * ROWS + token, self._count - 1))
        sink = scalar(tir.min(self._sink + row, i32(max(self.policy.sinks - 1, 0))))
        if not self.policy.ring:
            return sink
        place = scalar(self._ring + row - self._sinks)
        place = tir.Select(place >= self.policy.ring, place - self.policy.ring, place) + self.policy.sinks
        return scalar(tir.Select(row < self._sinks, sink, place))

    def _take(self, lane: Expr, turn: Expr) -> None:
        g, t = scalar(lane // 4), scalar(lane % 4)
        tokens = [8 * pair + 2 * t + u for pair in range(2) for u in range(2)]
        keys = [self._key(self._slot(turn, 8 * i + g), t) for i in range(ROWS // 8)]
        values = [self._values(self._slot(turn, token), g) for token in tokens]
        scores = Registers(ROWS // 4, "float32")
        for i in range(ROWS // 8):
            pair = self.keys.octet(lambda step, i=i: [keys[i][2 * step + k] for k in range(2)])
            for u in range(2):
                row = turn * ROWS + 8 * i + 2 * t + u
                scores[2 * i + u] = tir.Select(row < self._count, pair[u], tir.const(HIDDEN, "float32"))
        weights = self.weights.take_first(scores, lane)

        def fragment(j: int, half: int, x: int, pair: int) -> Expr:
            del x
            two = [values[2 * pair + u][j] for u in range(2)]
            return prmt(*two, u32(0x7632 if half else 0x5410))

        self.values.add(fragment, weights)

    def _key(self, row: Expr, t: Expr) -> Registers:
        """The lane's elements of a key: for each step, 16·step + 4t + 0 … 3 as two words."""
        words = Registers(self.head_dim // 8)
        for step in range(self.head_dim // 16):
            self._load(words, 2 * step, (0, row, 16 * step + 4 * t), 2)
        return words

    def _values(self, row: Expr, g: Expr) -> Registers:
        """Of each chunk of 32 dims (16 at an odd end) of a row, the lane's 4 (2) neighbouring elements."""
        words = Registers(self.head_dim // 16)
        for chunk in range(-(-self.head_dim // 32)):
            wide = self._chunk(2 * chunk)[1]
            self._load(words, 2 * chunk, (1, row, 32 * chunk + (4 if wide else 2) * g), 2 if wide else 1)
        return words

    def _chunk(self, j: int) -> tuple[int, bool]:
        """The chunk that block j of 16 dims lies in, and whether it is a whole one."""
        return j // 2, 32 * (j // 2) + 32 <= self.head_dim

    def place(self, lane: Expr, j: int, half: int) -> Expr:
        """The dim that the lane's half of block j is."""
        chunk, wide = self._chunk(j)
        if wide:
            return 32 * chunk + 4 * (lane // 4) + 2 * (j % 2) + half
        return 16 * j + 2 * (lane // 4) + half

    def _load(self, target: Registers, at: int, where: tuple[int, Expr, Expr], words: int) -> None:
        load_words(target, at, self.plain, [*self.where, *where], words, "global.nc")


class PlainShare:
    """A warp's share of the rows of a stream; ``slots`` keep its sums.

    ``slots_in_use``: how many of the block's warps have any, from the last one down; int32.
    """

    def __init__(self, place: DecodePlace, rows: PlainRows, slots: SumSlots, bounds: tuple[Expr, Expr, Expr]) -> None:
        """Begin to bring the first rows nearer. ``bounds``: see ``PlainRows.turns``."""
        self.place, self.rows, self.slots = place, rows, slots
        # From the last warps of every block on, which have no more tiles than others; or of blocks without tiles only.
        behind = place.warps - 1 - place.warp, place.splits - 1 - place.split
        apart = scalar((place.row_blocks > 0).astype("int32"))
        among = scalar(tir.Select(apart > 0, place.row_blocks, place.splits))
        self._first, self._step = scalar(behind[0] * among + behind[1]), scalar(among * place.warps)
        none = (apart > 0) & place.has_tiles
        turns = scalar(tir.Select(none, i32(0), rows.turns(bounds)))
        self._turns = scalar(turns - self._first)
        each = tir.max(turns - behind[1] + (among - 1), i32(0)) // among
        self.slots_in_use = scalar(tir.min(each, i32(place.warps)))
        # Streams of one block are those of large batches: memory is busy then, and the rows come no sooner.
        with T.If((self._turns > 0) & (place.splits > 1)), T.Then():
            rows.approach(place.lane, self._first)

    def attend(self, queries: DecodeQueries) -> None:
        """Attend to the rows."""
        place, rows = self.place, self.rows
        with T.If(self._turns > 0), T.Then():
            rows.keys.start(queries.load, queries.scale)
            rows.stream(place.lane, self._first, scalar((self._turns - 1) // self._step), self._step)
            self.slots.put(rows.weights, place.warp, place.lane, lambda j, half: rows.place(place.lane, j, half))
