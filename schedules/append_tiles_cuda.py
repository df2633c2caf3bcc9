"""Append of many tokens on CUDA: every warp writes whole tiles.

One half of the thread blocks writes keys, the other one values. Blocks stay and take tile after tile, since each
multiplies out a rotation first (``tile_rotation_cuda``). While a warp encodes half a tile, the next two halves of its
own are being copied.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, Codec, TileLayout

from .cuda_ops import WARP, Registers, block_sync, i32, scalar, shared_array, warp_sync
from .tile_encoder_cuda import TileEncoder
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, HalfTileRows, commit_copies, wait_for_copies

Expr = Any


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
        self.rotations = [TileRotation(codec, dtype, role) for role, codec in zip("kv", codecs, strict=True)]
        self.each = max(1, blocks // 2)
        self.half = HalfTileRows.halves(layout.head_dim, dtype)
        self.matrix = 2 * max(rotation.words for rotation in self.rotations)
        self.warps = next((w for w in range(warps, 0, -1) if 2 * (self.matrix + 2 * w * self.half) <= limit), 0)

    @property
    def possible(self) -> bool:
        """Whether both rotations can be multiplied out and the block's memory is enough."""
        return self.warps > 0 and all(rotation.possible for rotation in self.rotations)

    def launch(
        self, cache: Any, source: list[Any], coefficients: list[Any], lengths: tuple[Any, Any], resident: int
    ) -> None:
        """Emit the launch; ``lengths``: all, and new. ``resident``: blocks to a multiprocessor, for the registers."""
        batch, kv_heads, seq, _ = source[0].shape
        touched = (seq + (2 * TOKENS - 2)) // TOKENS
        units = batch * kv_heads * touched
        each = tir.min((units + (self.warps - 1)) // self.warps, tir.const(self.each, "int64"))
        threads = self.warps * WARP
        with T.launch_thread("blockIdx.x", each * 2) as block, T.launch_thread("threadIdx.x", threads) as thread:
            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", resident):
                shared = shared_array(self.matrix + 2 * self.warps * self.half, "uint16")
                block, thread = scalar(i32(block)), scalar(i32(thread))
                step = scalar(i32(each) * self.warps)
                first = scalar(block // 2 * self.warps + thread // WARP)
                with T.If(block % 2 == 0):
                    for role, frame in enumerate((T.Then, T.Else)):
                        with frame():
                            tiles = _Tiles(self, role, cache, source[role], lengths, i32(touched), shared, thread)
                            tiles.start(first, step, i32(units))
                            self._prepare(role, shared, coefficients[role], thread, threads)
                            tiles.run()

    def _prepare(self, role: int, shared: Any, coefficients: Any, thread: Expr, threads: int) -> None:
        rotation = self.rotations[role]
        if rotation.identity:
            return
        rotation.clear(shared, thread, threads)
        block_sync()
        rotation.prepare(shared, coefficients, thread, threads)
        block_sync()


class _Unit:
    """The tile that a warp works on: where it is, its new tokens ``low`` … ``high`` - 1, and the row of token 0."""

    NAMES = ("b", "head", "tile", "low", "high", "row")

    def __init__(self) -> None:
        self.cells = {name: Registers(1, "int32") for name in self.NAMES}

    def __getattr__(self, name: str) -> Expr:
        return self.cells[name][0]

    def set(self, **values: Expr) -> None:
        """Assign some of the names."""
        for name, value in values.items():
            self.cells[name][0] = value

    def assign(self, other: _Unit) -> None:
        """Become another unit."""
        self.set(**{name: other.cells[name][0] for name in self.NAMES})

    @property
    def at(self) -> tuple[Expr, Expr, Expr]:
        """Where the tile is in a cache."""
        return tuple(self.cells[name][0].astype("int64") for name in ("b", "head", "tile"))


class _Tiles:
    """A warp's tiles of one role, one after the other."""

    def __init__(
        self,
        plan: TileAppend,
        role: int,
        cache: Any,
        x: Any,
        lengths: tuple[Any, Any],
        touched: Expr,
        shared: Any,
        thread: Expr,
    ) -> None:
        self.cache, self.x, self.lengths, self.touched = cache, x, lengths, scalar(touched)
        self.tiles = scalar(i32(cache.shape[2])) if plan.wraps else None
        self.kv_heads = i32(x.shape[1])
        self.lane = scalar(thread % WARP)
        self.encoder = TileEncoder(cache, plan.layout, plan.codecs[role], plan.rotations[role], self.lane)
        base = scalar(thread // WARP * (2 * plan.half) + plan.matrix)
        self.rows = lambda half: HalfTileRows(
            shared, plan.layout.head_dim, plan.dtype, scalar(base + half * plan.half), self.lane
        )
        self.now, self.next = _Unit(), _Unit()

    def start(self, first: Expr, step: Expr, units: Expr) -> None:
        """Start copying the first of tiles ``first``, ``first + step``, … below ``units``."""
        self.first, self.step, self.units = first, step, scalar(units)
        self._find(self.now, first)
        for half in range(2):
            self._copy(self.now, i32(half))

    def run(self) -> None:
        """Write all of them."""
        unit = Registers(1, "int32")
        unit[0] = self.first
        with T.serial(0, scalar((self.units - self.first + (self.step - 1)) // self.step)) as _:
            unit[0] = unit[0] + self.step
            self._find(self.next, unit[0])
            with T.If(self.now.high > self.now.low):
                with T.Then():
                    self.encoder.encode(self.now.at, (self.now.low, self.now.high), self._fetch, self._release)
                with T.Else():
                    for half in range(2):
                        self._copy(self.next, i32(half))
            self.now.assign(self.next)

    def _find(self, found: _Unit, unit: Expr) -> None:
        """Which tokens of which tile a unit is; none for one that there is not."""
        number = scalar(tir.min(unit, self.units - 1))
        b = scalar(number // (self.touched * self.kv_heads))
        length = scalar(self.lengths[0][b])
        start = scalar(length - self.lengths[1][b])
        tile = scalar(start // TOKENS + number % self.touched)
        place, exists = self._place(tile, length)
        exists = tir.all(unit < self.units, exists)
        high = tir.Select(exists, tir.min(length - tile * TOKENS, i32(TOKENS)), i32(0))
        low = tir.max(start - tile * TOKENS, i32(0))
        head = number // self.touched % self.kv_heads
        found.set(b=b, head=head, tile=place, low=low, high=high, row=tile * TOKENS - start)

    def _place(self, tile: Expr, length: Expr) -> tuple[Expr, Expr]:
        """Where in the cache a sequence's tile stands, and whether it has a place there."""
        if self.tiles is None:
            return tile, tile.astype("int64") < self.cache.shape[2]
        return tile % self.tiles, (tile + self.tiles) * TOKENS >= length

    def _copy(self, unit: _Unit, half: Expr) -> None:
        """Start copying the rows of half a unit (none, if it has no tokens)."""

        def source(row: Expr, element: Expr) -> tuple[Any, list[Expr], Expr]:
            token = half * ROWS + row
            index = [*unit.at[:2], (unit.row + token).astype("int64"), element]
            return self.x, index, tir.all(token >= unit.low, token < unit.high)

        with T.If(unit.high > unit.low), T.Then():
            self.rows(half).copy(source)
        commit_copies()

    def _fetch(self, half: Expr) -> HalfTileRows:
        wait_for_copies(1)
        return self.rows(i32(half))

    def _release(self, half: Expr) -> None:
        warp_sync()
        self._copy(self.next, i32(half))
