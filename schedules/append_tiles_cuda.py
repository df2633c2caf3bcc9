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

from .block_codes_cuda import has_block_codes, matrix_scale
from .cuda_ops import WARP, Registers, i32, scalar, shared_array, warp_sync
from .tile_encoder_cuda import TileEncoder
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, HalfTileRows, commit_copies, wait_for_copies

Expr = Any
SPAN = 64
"""Two numbers of tokens share a register: one of them so many times."""


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
        scales = [matrix_scale(dtype) if first else 1.0 for first in self.early]
        parts = zip(codecs, "kv", scales, strict=True)
        self.rotations = [TileRotation(codec, dtype, role, scale) for codec, role, scale in parts]
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
                            rotation = self.rotations[role]
                            if not rotation.identity:
                                rotation.fetch(coefficients[role], thread, threads)
                            tiles.start(first, step, i32(units))
                            if not rotation.identity:
                                rotation.prepare(shared, thread, threads)
                            tiles.run()


class _Cells:
    """Named int32 values that change."""

    def __init__(self, *names: str) -> None:
        self.cells = {name: Registers(1, "int32") for name in names}

    def __getattr__(self, name: str) -> Expr:
        return self.cells[name][0]

    def set(self, **values: Expr) -> None:
        """Assign some of the names."""
        for name, value in values.items():
            self.cells[name][0] = value


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
        self.cache, self.x, self.lengths, self.touched = cache, x, lengths, touched
        self.tiles = scalar(i32(cache.shape[2])) if plan.wraps else None
        self.kv_heads = i32(x.shape[1])
        self.lane = scalar(thread % WARP)
        codec, rotation, early = (part[role] for part in (plan.codecs, plan.rotations, plan.early))
        self.encoder = TileEncoder(cache, plan.layout, codec, rotation, self.lane, early)
        base = scalar(thread // WARP * (2 * plan.half) + plan.matrix)
        self.rows = lambda half: HalfTileRows(
            shared, plan.layout.head_dim, plan.dtype, scalar(base + half * plan.half), self.lane
        )
        # The tile in hand and the next one: its head of a sequence (``_side``), its place in the cache, its new tokens
        # (``_tokens``), and the row of its token 0.
        self.now, self.next = _Cells("side", "tile", "span"), _Cells("side", "tile", "span", "row")

    def start(self, first: Expr, step: Expr, units: Expr) -> None:
        """Start copying the first of tiles ``first``, ``first + step``, … below ``units``."""
        self.number, self.step, self.units = Registers(1, "int32"), step, units
        self.number[0] = first
        self._find()
        self._copy_both()

    def run(self) -> None:
        """Write all of them."""
        with T.While(self.number[0] < self.units):
            self.now.set(**{name: getattr(self.next, name) for name in ("side", "tile", "span")})
            self.number[0] = self.number[0] + self.step
            self._find()
            first, last = self._tokens(self.now)
            with T.If(last > first):
                with T.Then():
                    at = (*self._side(self.now.side), self.now.tile.astype("int64"))
                    self.encoder.encode(at, (first, last), self._fetch, self._release)
                with T.Else():
                    self._copy_both()

    def _side(self, number: Expr) -> tuple[Expr, Expr]:
        """(sequence, head)."""
        return (number // self.kv_heads).astype("int64"), (number % self.kv_heads).astype("int64")

    def _find(self) -> None:
        """Which tokens of which tile a number stands for; none if it is past the last one."""
        number = self.number[0]
        exists = scalar((number < self.units).astype("int32"))
        side = scalar(tir.Select(exists != 0, tir.truncdiv(number, self.touched), i32(0)))
        b = scalar(side // self.kv_heads)
        length = scalar(self.lengths[0][b])
        start = scalar(length - self.lengths[1][b])
        tile = scalar(start // TOKENS + number - side * self.touched)
        place, has_place = self._place(tile, length)
        last = tir.min(length - tile * TOKENS, i32(TOKENS))
        high = tir.Select(tir.all(exists != 0, has_place), last, i32(0))
        low = tir.min(tir.max(start - tile * TOKENS, i32(0)), i32(TOKENS))
        self.next.set(side=side, tile=place, span=high * SPAN + low, row=tile * TOKENS - start)

    def _tokens(self, unit: _Cells) -> tuple[Expr, Expr]:
        """A tile's first new token, and the one after its last."""
        return unit.span % SPAN, unit.span // SPAN

    def _place(self, tile: Expr, length: Expr) -> tuple[Expr, Expr]:
        """Where in the cache a sequence's tile stands, and whether it has a place there."""
        if self.tiles is None:
            return tile, tile.astype("int64") < self.cache.shape[2]
        return tile % self.tiles, (tile + self.tiles) * TOKENS >= length

    def _copy_both(self) -> None:
        with T.serial(0, 2) as half:
            self._copy(i32(half))

    def _copy(self, half: Expr) -> None:
        """Start copying the rows of half the next tile (none, if it has no tokens)."""
        unit, first = self.next, scalar(half * ROWS)
        row, rows = scalar((unit.row + first).astype("int64")), self.rows(half)
        b, head = self._side(unit.side)

        def source(token: Expr, element: Expr) -> tuple[Any, list[Expr]]:
            return self.x, [b, head, row + token, element]

        low, high = self._tokens(unit)
        with T.If(tir.all(low <= first, high >= first + ROWS)):
            with T.Then():
                rows.copy(source)
            with T.Else(), T.If(high > low), T.Then():
                rows.copy_some(source, scalar(low - first), scalar(high - first))
        commit_copies()

    def _fetch(self, half: Expr) -> HalfTileRows:
        wait_for_copies(1)
        return self.rows(i32(half))

    def _release(self, half: Expr) -> None:
        warp_sync()
        self._copy(i32(half))
