"""Queries in shared memory as integer tensor cores take them, on CUDA: rounded once for all warps of a thread block."""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, across, bits_of, block_sync, f32, float_of, load_words, scalar
from .decode_scores_cuda import IntegerScores, rounded_words, rounding
from .query_rotation_cuda import SharedRows

Expr = Any
PADDING = 4
"""Words between rows, which keep eight rows' words in different banks."""
WIDE = 4 * WARP
"""Elements that a warp takes at a time."""


class RoundedQueries:
    """The rows that ``SharedRows`` hold, as words of four coarse parts, of four fine parts, and a unit each.

    They stand where the rows' other copy does, which is free until something is rotated again.
    """

    SMALLEST = 32
    """Dims that a row has at least, for the other copy to be large enough."""

    def __init__(self, queries: SharedRows, lane: Expr, warp: Expr, warps: int) -> None:
        self.queries, self.shared, self.lane, self.warp, self.warps = queries, queries.shared, lane, warp, warps
        self.head_dim = queries.head_dim
        self.stride = self.head_dim // 4 + PADDING

    def round(self, scale: float) -> None:
        """Round the rows, each by one warp; ends with a barrier. ``scale``: the softmax scale in units of log2."""
        rows = self.queries.rows
        for first in range(0, rows, self.warps):
            row = scalar(first + self.warp)
            with T.If(row < rows), T.Then():
                self._round(row, scale)
        block_sync()

    def _round(self, row: Expr, scale: float) -> None:
        values = Registers(4 * -(-self.head_dim // WIDE), "float32")
        values.fill(f32(0))
        parts = [(4 * n, scalar(n * WIDE + 4 * self.lane)) for n in range(values.count // 4)]
        for at, dim in parts:
            with T.If(dim < self.head_dim), T.Then():
                load_words(values, at, self.shared, [self.queries.at(row, dim)], 4, "shared")
        most = f32(0)
        for value in values:
            most = tir.max(most, tir.abs(value))
        finest, unit = rounding(across(scalar(most), tir.max, (1, 2, 4, 8, 16)), scale)
        for at, dim in parts:
            words = rounded_words([values[at + e] for e in range(4)], finest)
            with T.If(dim < self.head_dim), T.Then():
                for part, word in enumerate(words):
                    T.buffer_store(self.shared, word, [self._at(part, row, dim // 4)])
        with T.If(self.lane == 0), T.Then():
            T.buffer_store(self.shared, bits_of(unit), [self._unit(row)])

    def fetch(self, keys: IntegerScores, row: Expr) -> None:
        """Hand the lane's part of a row to the scores (``IntegerScores.start``)."""
        for step in range(keys.steps):
            word = 4 * step + self.lane % 4
            keys.coarse[step] = self.shared[self._at(0, row, word)]
            keys.fine[step] = self.shared[self._at(1, row, word)]
        keys.unit[0] = float_of(self.shared[self._unit(row)])

    def _at(self, part: int, row: Expr, word: Expr) -> Expr:
        return self.queries.at(0, 0, 1 - self.queries.now) + (part * self.queries.rows + row) * self.stride + word

    def _unit(self, row: Expr) -> Expr:
        return self.queries.at(0, 0, 1 - self.queries.now) + 2 * self.queries.rows * self.stride + row
