"""Centres of keys in decode attention, on CUDA: scored for several of a warp's tiles by one product.

A product of the tensor cores has eight columns. With a centre in each, it costs as much as one centre alone, and a
tile is left with one exchange between lanes. The words come by asynchronous copies, which take no registers, as soon as
those of the tiles before have been scored; the first ones right behind the first tile: behind the second they would
stand in line (1.7 µs at 1 × 32,768).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, float_of, i32, ptx, scalar, shuffle, u32, warp_sync
from .decode_scores_cuda import IntegerScores

Expr = Any
COLUMNS = 8
FEW_COLUMNS = 2
UNIT = 4
"""Words of a copy. A centre begins anywhere, so its first and last unit have others' words too."""


class TileCentres:
    """The centres of a warp's tiles, ``columns`` (2, 4 or 8) at a time, in words ``first`` … of ``shared`` (uint32).

    ``centres``: uint32 [batch, kv_heads, blocks, head_dim / 4 + 1], of which the stream's are at ``where`` (batch,
    kv_head). ``bulk``: whether tiles come by bulk copies; else these copies join the groups of theirs (``TileRing``),
    which have fewer stages than there are columns, or as many.
    """

    def __init__(
        self,
        shared: Any,
        first: Expr,
        centres: Any,
        where: tuple[Expr, Expr],
        lane: Expr,
        bulk: bool,
        columns: int = COLUMNS,
    ) -> None:
        self.shared, self.centres, self.where, self.bulk, self.columns = shared, centres, where, bulk, columns
        self.head_dim = 4 * (int(centres.shape[3]) - 1)
        self.g, self.t = scalar(lane // 4), scalar(lane % 4)
        # Columns without a centre of their own repeat others'.
        self._column = scalar(self.g % columns)
        self._row = scalar(first + self._column * _pitch(self.head_dim))
        heads, blocks = (i32(size) for size in centres.shape[1:3])
        self._before = scalar((where[0] * heads + where[1]) * blocks)
        self._offsets = Registers(2, "float32")

    @staticmethod
    def words(head_dim: int, columns: int = COLUMNS) -> int:
        """Words of shared memory that a warp needs."""
        return columns * _pitch(head_dim)

    def begin(self, block_of: Callable[[Expr], Expr], exists: Callable[[Expr], Expr]) -> None:
        """Begin to copy those of the first tiles.

        ``block_of(number)``: the block of tokens that the warp's tile ``number`` is of, if it ``exists``.
        """
        self._block_of, self._exists = block_of, exists
        self._ask(i32(0))

    def score(self, keys: IntegerScores, number: Expr) -> Expr:
        """The score of the lane's query row against the centre of tile ``number``, which has come; ask in order."""
        column = scalar(number % self.columns)
        with T.If(column == 0), T.Then():
            if self.bulk:
                ptx("cp.async.wait_group", 0)
                warp_sync()
            first = scalar(self._row + self._offset(scalar(self._block_of(number + self._column))))
            words = Registers(self.head_dim // 16)
            for step in range(words.count):
                words[step] = self.shared[first + (4 * step + self.t)]
            scale = scalar(float_of(self.shared[first + self.head_dim // 4]))
            for u, score in enumerate(keys.centres(words, scale)):
                self._offsets[u] = score
            warp_sync()
            self._ask(scalar(number + self.columns))
        mine = tir.Select(column % 2 == 0, self._offsets[0], self._offsets[1])
        return scalar(shuffle(scalar(mine), 4 * self.g + column // 2))

    def _offset(self, block: Expr) -> Expr:
        """Words from the beginning of a unit to that of the centre."""
        # Rows are a multiple of four words and one more.
        return (self._before + block) & i32(UNIT - 1)

    def _ask(self, number: Expr) -> None:
        mine = scalar(number + self._column)
        units = self.head_dim // 16 + 1
        with T.If((self.g < self.columns) & self._exists(mine)), T.Then():
            block = scalar(self._block_of(mine))
            offset = scalar(self._offset(block))
            for start in range(0, units, 4):
                if start + 4 <= units:
                    self._copy(block, offset, start + self.t)
                    continue
                with T.If(start + self.t < units), T.Then():
                    self._copy(block, offset, start + self.t)
        if self.bulk:
            ptx("cp.async.commit_group")

    def _copy(self, block: Expr, offset: Expr, unit: Expr) -> None:
        """Copy a unit, without what follows the centre: there may be nothing."""
        source = self.centres.ptr_to([*self.where, block, UNIT * unit - offset])
        target = self.shared.ptr_to([self._row + UNIT * unit])
        left = self.head_dim // 4 + 1 + offset - UNIT * unit
        ptx("cp.async.cg.shared.global", target, source, 16, u32(4 * tir.min(left, i32(UNIT))))


def _pitch(head_dim: int) -> int:
    """Words from one centre to the next: lanes of eight centres then read from banks of their own."""
    return head_dim // 4 + UNIT
