"""Centres of keys in decode attention, on CUDA: scored for eight of a warp's tiles by one product.

A product of the tensor cores has eight columns. With a centre in each, it costs as much as one centre alone, and a
tile is left with one exchange between lanes. The words come by asynchronous copies, which take no registers, as soon as
those of the eight tiles before have been scored. Every lane reads what it copied itself: nothing is waited for but its
own copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, f32, float_of, i32, ptx, scalar, shuffle
from .decode_scores_cuda import IntegerScores

Expr = Any
COLUMNS = 8


class TileCentres:
    """The centres of a warp's tiles, eight at a time, in words ``first`` … of ``shared`` (uint32).

    ``bulk``: whether tiles come by bulk copies; else these copies join the groups of theirs (``TileRing``), which have
    fewer than eight stages.
    """

    def __init__(self, shared: Any, first: Expr, head_dim: int, lane: Expr, bulk: bool) -> None:
        self.shared, self.head_dim, self.bulk = shared, head_dim, bulk
        self.g, self.t = scalar(lane // 4), scalar(lane % 4)
        self._row = scalar(first + self.g * _pitch(head_dim))
        self._offsets = Registers(2, "float32")

    @staticmethod
    def words(head_dim: int) -> int:
        """Words of shared memory that a warp needs."""
        return COLUMNS * _pitch(head_dim)

    def begin(self, source: Callable[[Expr, Expr], Expr], exists: Callable[[Expr], Expr]) -> None:
        """Begin to copy those of the first eight tiles; without bulk copies to be called before the ring's start.

        ``source(number, word)``: the address of a word of the centre of the warp's tile ``number``.
        """
        self._source, self._exists = source, exists
        self._ask(i32(0))

    def score(self, keys: IntegerScores, number: Expr) -> Expr:
        """The score of the lane's query row against the centre of tile ``number``, which has come; ask in order."""
        column = scalar(number % COLUMNS)
        with T.If(column == 0), T.Then():
            if self.bulk:
                ptx("cp.async.wait_group", 0)
            words = Registers(self.head_dim // 16)
            for step in range(words.count):
                words[step] = self.shared[self._row + (4 * step + self.t)]
            # The other lanes of a centre copied no scale, and theirs is not asked for.
            scale = scalar(float_of(self.shared[self._row + self.head_dim // 4]))
            for u, score in enumerate(keys.centres(words, scale)):
                self._offsets[u] = score
            self._ask(scalar(number + COLUMNS))
        mine = tir.Select(column % 2 == 0, self._offsets[0], self._offsets[1])
        return scalar(shuffle(scalar(mine), 4 * self.g + column // 2))

    def _ask(self, number: Expr) -> None:
        mine = scalar(number + self.g)
        with T.If(self._exists(mine)), T.Then():
            for step in range(self.head_dim // 16):
                self._copy(mine, 4 * step + self.t)
            with T.If(self.t == 0), T.Then():
                self._copy(mine, i32(self.head_dim // 4))
        if self.bulk:
            ptx("cp.async.commit_group")

    def _copy(self, number: Expr, word: Expr) -> None:
        target = self.shared.ptr_to([self._row + word])
        ptx("cp.async.ca.shared.global", target, self._source(number, word), 4)


def _pitch(head_dim: int) -> int:
    """Words from one centre to the next: lanes of eight centres then read from banks of their own."""
    return head_dim // 4 + 4
