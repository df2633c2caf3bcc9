"""Append of many tokens on CUDA: every warp writes whole tiles.

Blocks stay and their warps take tile after tile (``warp_tiles_cuda``), since each block multiplies out rotations first
(``tile_rotation_cuda``). Where both fit, some warps of every block write keys and the others values, as many as the
work asks for, so that all multiprocessors have the same to do; else half of the blocks write keys.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, Codec, TileLayout

from .block_codes_cuda import has_block_codes, matrix_scale
from .cuda_ops import WARP, block_sync, i32, scalar, shared_array
from .quartet_layer_cuda import QuartetLayer
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import HalfTileRows
from .warp_tiles_cuda import WarpTiles

Expr = Any
TOGETHER = 65536
"""So many bytes both rotations may take at most if a block is to write keys and values."""
COST = 13
"""The work of a tile of keys, of which values, and a format that ``needs_square``, take one more."""


class TileAppend:
    """The launch for any number of new tokens; ``codecs`` are K's and V's."""

    def __init__(
        self,
        layout: TileLayout,
        codecs: tuple[Codec, Codec],
        dtype: str,
        *,
        warps: int,
        blocks: int,
        limit: int,
        wraps: bool = False,
    ) -> None:
        """Plan it, emitting nothing.

        ``warps``: at most so many to a block. ``blocks``: how many the GPU should hold at once. ``limit``: bytes of
        shared memory that a block may have. ``wraps``: the cache is a ring of tiles.
        """
        self.layout, self.codecs, self.dtype, self.wraps = layout, codecs, dtype, wraps
        self.early = [has_block_codes(codec, dtype) for codec in codecs]
        self.rotations = []
        for codec, role, first in zip(codecs, "kv", self.early, strict=True):
            apart = first and dtype == "float16" and QuartetLayer.possible(codec)
            outer = QuartetLayer(codec, role) if apart else None
            self.rotations.append(TileRotation(codec, dtype, role, matrix_scale(dtype) if first else 1.0, outer))
        self.blocks = max(2, blocks)
        self.swizzled = HalfTileRows.can_swizzle(layout.head_dim, dtype)
        self.half = HalfTileRows.halves(layout.head_dim, dtype, self.swizzled)
        sizes = [2 * rotation.words for rotation in self.rotations]
        self.together = 2 * sum(sizes) <= TOGETHER
        self.matrix = sum(sizes) if self.together else max(sizes)
        self.warps = next((w for w in range(warps, 0, -1) if 2 * self._halves(w) <= limit), 0)

    def _halves(self, warps: int) -> int:
        """uint16 elements of shared memory: the matrices, and the warps' rows."""
        return self.matrix + 2 * warps * self.half

    @property
    def possible(self) -> bool:
        """Whether both rotations can be multiplied out and the block's memory is enough."""
        return self.warps > 0 and all(rotation.possible for rotation in self.rotations)

    def tiles_per_warp(self, x: Any) -> Expr:
        """How many tiles of rows ``x`` a warp has at most, of both roles (int64)."""
        batch, kv_heads, seq, _ = x.shape
        units = batch * kv_heads * ((seq + (2 * TOKENS - 2)) // TOKENS)
        warps = self.blocks // 2 * 2 * self.warps
        return (2 * units + (warps - 1)) // warps

    def launch(
        self, cache: Any, source: list[Any], coefficients: list[Any], lengths: tuple[Any, Any], resident: int
    ) -> None:
        """Emit the launch; ``lengths``: all, and new. ``resident``: blocks to a multiprocessor, for the registers."""
        batch, kv_heads, seq, _ = source[0].shape
        touched = (seq + (2 * TOKENS - 2)) // TOKENS
        units, threads = batch * kv_heads * touched, self.warps * WARP
        pairs = tir.min(units, tir.const(self.blocks // 2, "int64"))
        with T.launch_thread("blockIdx.x", pairs * 2) as block, T.launch_thread("threadIdx.x", threads) as thread:
            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", resident):
                shared = shared_array(self._halves(self.warps), "uint16")
                block, thread, pairs = scalar(i32(block)), scalar(i32(thread)), scalar(i32(pairs))
                tiles = WarpTiles(self, cache, source, lengths, i32(touched), i32(batch * kv_heads), shared, thread)
                if self.together:
                    number = scalar(thread // WARP * (2 * pairs) + block)
                    tiles.share(number, pairs * (2 * self.warps), self._keys_share(i32(units), pairs))
                    self._run_together(tiles, coefficients, shared, thread)
                else:
                    number = scalar(thread // WARP * pairs + block // 2)
                    tiles.share(number, pairs * self.warps, None)
                    with T.If(block % 2 == 0):
                        for role, frame in enumerate((T.Then, T.Else)):
                            with frame():
                                self._run_apart(role, tiles, coefficients, shared, thread)

    def _keys_share(self, units: Expr, pairs: Expr) -> Expr:
        """How many warps write keys, of all: one to a tile if these are enough, else by the work."""
        warps = pairs * (2 * self.warps)
        costs = [COST + (role == "v") + needs_square(codec) for role, codec in zip("kv", self.codecs, strict=True)]
        return scalar(tir.Select(2 * units <= warps, units, warps * costs[0] // sum(costs)))

    def _run_together(self, tiles: WarpTiles, coefficients: list[Any], shared: Any, thread: Expr) -> None:
        """Some warps of every block write keys, the others values."""
        threads, first = self.warps * WARP, 0
        turned = [
            (rotation, data)
            for rotation, data in zip(self.rotations, coefficients, strict=True)
            if not rotation.identity
        ]
        for rotation, data in turned:
            rotation.fetch(data, thread, threads)
        tiles.start()
        for rotation, _ in turned:
            rotation.prepare(shared, first, thread, threads)
            first += 2 * rotation.words
        if turned:
            block_sync()
        tiles.start_more()
        with T.If(tiles.role == 0):
            for role, frame in enumerate((T.Then, T.Else)):
                with frame():
                    tiles.run(role)

    def _run_apart(self, role: int, tiles: WarpTiles, coefficients: list[Any], shared: Any, thread: Expr) -> None:
        """All warps of the block write the same: there is memory for one rotation only."""
        rotation, threads = self.rotations[role], self.warps * WARP
        if not rotation.identity:
            rotation.fetch(coefficients[role], thread, threads)
        tiles.start(role)
        if not rotation.identity:
            rotation.prepare(shared, 0, thread, threads)
            block_sync()
        tiles.start_more(role)
        tiles.run(role)


def needs_square(codec: Codec) -> bool:
    """Whether a format's gain takes the sum of the centroids' squares."""
    return codec.format.gain in ("mse", "norm") and codec.format.bits > 1
