"""A warp's own stream of packed tiles through shared memory, on CUDA: copies run ahead of the warp that reads them.

No barrier of the block is involved: every warp fills and empties a ring of its own. From sm_90 on a tile is one bulk
copy, announced to a barrier in shared memory; before that, the lanes copy 16 bytes each and count groups of copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.backend.cuda import op as cuda
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, ptx, u32, warp_sync

Expr = Any
EVICT_FIRST = 0x12F0000000000000
"""The cache policy that gives up lines before all others, as ``createpolicy`` makes it (which takes an instruction)."""


@dataclass
class TileRing:
    """``stages`` tiles of ``tile_words`` words each, in words ``first`` … of ``shared`` (uint32).

    ``barrier``: the first word of the ring's barriers, two words each (unused without bulk copies). ``source(number)``
    gives the address of the stream's tile ``number``; tiles come and go in order. ``depth``: how many of the stages are
    in use; all without bulk copies. ``once``: nobody else reads the tiles, which need not stay in the L2 cache.
    """

    shared: Any
    first: Expr
    barrier: Expr
    stages: int
    tile_words: int
    lane: Expr
    bulk: bool
    depth: Expr
    once: bool

    def __post_init__(self) -> None:
        self._stage, self._phase = Registers(1, "int32"), Registers(1, "int32")

    def prepare(self) -> None:
        """Set the barriers up; best before anything is loaded, since it waits for that."""
        self._stage[0], self._phase[0] = 0, 0
        if self.bulk:
            with T.If(self.lane == 0), T.Then():
                for stage in range(self.stages):
                    ptx("mbarrier.init.shared.b64", self._barrier(stage), u32(1))
                ptx("fence.mbarrier_init.release.cluster")
                ptx("fence.proxy.async.shared::cta")
            warp_sync()

    def start(
        self, source: Any, exists: Callable[[int], Expr], beside_first: Callable[[], None] | None = None
    ) -> None:
        """Begin to copy the stream's first ``stages`` tiles, as far as they exist.

        ``beside_first`` begins to copy what is needed with the first tile.
        """
        for stage in range(self.stages):
            if stage == 0 and beside_first is not None and not self.bulk:  # into the same group of copies
                beside_first()
            self._copy(source, stage, stage, exists(stage) & (self.depth > stage) if stage else exists(stage))
            if stage == 0 and beside_first is not None and self.bulk:
                beside_first()

    def wait(self) -> Expr:
        """Wait for the oldest tile; returns its first word in ``shared``."""
        if self.bulk:
            T.evaluate(cuda.cuda_mbarrier_wait(self._barrier(self._stage[0]), self._phase[0]))
        else:
            ptx("cp.async.wait_group", self.stages - 1)
            warp_sync()
        return self.first + self._stage[0] * self.tile_words

    def refill(self, source: Any, number: Expr, count: Expr) -> None:
        """Copy tile ``number`` (if below ``count``) where the oldest one was, which every lane has done reading."""
        if self.bulk:
            ptx("fence.proxy.async.shared::cta")  # a warp's barrier alone waits for no loads
        warp_sync()
        self._copy(source, self._stage[0], number, number < count)

    def advance(self) -> None:
        """Turn to the next tile."""
        self._stage[0] = self._stage[0] + 1
        with T.If(self._stage[0] == self.depth), T.Then():
            self._stage[0] = 0
            self._phase[0] = 1 - self._phase[0]

    def _barrier(self, stage: Expr) -> Expr:
        return self.shared.ptr_to([self.barrier + 2 * stage])

    def _copy(self, source: Any, stage: Expr, number: Expr, exists: Expr) -> None:
        at = self.first + stage * self.tile_words
        if self.bulk:
            with T.If(exists & (self.lane == 0)), T.Then():
                state = Registers(1, "uint64")
                size = u32(4 * self.tile_words)
                ptx("mbarrier.arrive.expect_tx.shared.b64", state[0], self._barrier(stage), size)
                operands = self.shared.ptr_to([at]), source(number, 0), size, self._barrier(stage)
                copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                if self.once:
                    ptx(f"{copy}.L2::cache_hint", *operands, tir.const(EVICT_FIRST, "uint64"))
                else:
                    ptx(copy, *operands)
            return
        with T.If(exists), T.Then():
            for start in range(0, self.tile_words, 4 * WARP):
                word = start + 4 * self.lane

                def copy(word: Expr = word) -> None:
                    ptx("cp.async.cg.shared.global", self.shared.ptr_to([at + word]), source(number, word), 16)

                if start + 4 * WARP <= self.tile_words:
                    copy()
                else:
                    with T.If(word < self.tile_words), T.Then():
                        copy()
        ptx("cp.async.commit_group")
