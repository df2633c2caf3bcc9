"""The tiles of a warp in an append on CUDA, one after the other: which tokens they take, their copies, their encoding.

While a warp encodes half a tile, the next two halves of its own are being copied.
"""

from __future__ import annotations

from typing import Any, Protocol

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, Codec, TileLayout

from .cuda_ops import WARP, Registers, i32, load_words, scalar, warp_sync
from .tile_encoder_cuda import TileEncoder
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, HalfTileRows, commit_copies, wait_for_copies

Expr = Any
SPAN = 64
"""Two numbers of tokens share a register: one of them so many times."""


class TilePlan(Protocol):
    """What there is to know of a launch (``append_tiles_cuda``), of both roles where there are two.

    half     uint16 elements of the rows of half a tile; swizzled: how they lie (``tile_rows_cuda``).
    matrix   uint16 elements of shared memory before them.
    early    whether norms come first (``block_codes_cuda``).
    wraps    whether the cache is a ring of tiles.
    """

    layout: TileLayout
    codecs: tuple[Codec, Codec]
    rotations: list[TileRotation]
    early: list[bool]
    dtype: str
    warps: int
    half: int
    matrix: int
    swizzled: bool
    wraps: bool


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


class WarpTiles:
    """A warp's tiles, one after the other."""

    def __init__(
        self,
        plan: TilePlan,
        cache: Any,
        sources: list[Any],
        lengths: tuple[Any, Any],
        touched: Expr,
        sides: Expr,
        shared: Any,
        thread: Expr,
    ) -> None:
        """``touched``: tiles of each of ``sides`` heads of a sequence."""
        self.plan, self.cache, self.sources, self.lengths = plan, cache, sources, lengths
        self.touched, self.sides = touched, sides
        self.tiles = scalar(i32(cache.shape[2])) if plan.wraps else None
        self.kv_heads = i32(sources[0].shape[1])
        self.lane = scalar(thread % WARP)
        base = scalar(thread // WARP * (2 * plan.half) + plan.matrix)
        self.rows = lambda half: HalfTileRows(
            shared, plan.layout.head_dim, plan.dtype, scalar(base + half * plan.half), self.lane, plan.swizzled
        )
        # The tile in hand and the next one: its head of a sequence (``_side``), its place in the cache, its new tokens
        # (``_tokens``), and the row of its token 0. ``place`` counts a sequence's tiles from that of its first new
        # token.
        self.now, self.next = _Cells("side", "tile", "span"), _Cells("side", "tile", "span", "row")
        self.place = _Cells("side", "tile")

    def share(self, number: Expr, warps: Expr, keys: Expr | None) -> None:
        """Warp ``number`` of ``warps`` has this one of so many shares; the first ``keys``, if given, are of keys."""
        if keys is None:
            self.role, self.first, self.step = None, number, scalar(warps)
            return
        self.role = scalar((number >= keys).astype("int32"))
        self.first = scalar(number - self.role * keys)
        self.step = scalar(tir.Select(self.role == 0, keys, warps - keys))

    def start(self, role: int | None = None) -> None:
        """Start copying the first half of the warp's first tile; ``role`` is needed if the block has only one."""
        side = tir.truncdiv(self.first, self.touched)
        self.place.set(side=side)
        self.place.set(tile=self.first - self.place.side * self.touched)
        self._find()
        self._copy_first(0, role)

    def start_more(self, role: int | None = None) -> None:
        """Start copying its second half: later, since a warp that copies much at once waits for memory."""
        self._copy_first(1, role)
        side = scalar(tir.truncdiv(self.step, self.touched))
        self.stride = (side, scalar(self.step - side * self.touched))

    def _copy_first(self, half: int, role: int | None) -> None:
        if role is not None:
            self._copy(i32(half), role)
            return
        with T.If(self.role == 0):
            for each, frame in enumerate((T.Then, T.Else)):
                with frame():
                    self._copy(i32(half), each)

    def run(self, role: int) -> None:
        """Write all of them, which are of this role."""
        plan = self.plan
        codec, rotation, early = (part[role] for part in (plan.codecs, plan.rotations, plan.early))
        encoder = TileEncoder(self.cache, plan.layout, codec, rotation, self.lane, early)

        def release(half: Expr) -> None:
            warp_sync()
            self._copy(i32(half), role)

        with T.While(self.place.side < self.sides):
            self.now.set(**{name: getattr(self.next, name) for name in ("side", "tile", "span")})
            self._advance()
            self._find()
            first, last = self._tokens(self.now)
            with T.If(last > first):
                with T.Then():
                    at = (*self._side(self.now.side), self.now.tile.astype("int64"))
                    encoder.encode(at, (first, last), self._fetch, release)
                with T.Else(), T.serial(0, 2) as half:
                    self._copy(i32(half), role)

    def _advance(self) -> None:
        """Turn to the tile ``step`` further; a division takes long."""
        side, tile = self.stride
        self.place.set(side=self.place.side + side, tile=self.place.tile + tile)
        with T.If(self.place.tile >= self.touched), T.Then():
            self.place.set(side=self.place.side + 1, tile=self.place.tile - self.touched)

    def _side(self, number: Expr) -> tuple[Expr, Expr]:
        """(sequence, head)."""
        return (number // self.kv_heads).astype("int64"), (number % self.kv_heads).astype("int64")

    def _find(self) -> None:
        """Which tokens of which tile are in hand; none if it is past the last one."""
        exists = scalar((self.place.side < self.sides).astype("int32"))
        side = scalar(tir.Select(exists != 0, self.place.side, i32(0)))
        b = scalar(side // self.kv_heads)
        counts = Registers(2, "int32")
        for n, array in enumerate(self.lengths):
            load_words(counts, n, array, [b], 1, "global")
        length, start = counts[0], scalar(counts[0] - counts[1])
        tile = scalar(start // TOKENS + self.place.tile)
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

    def _copy(self, half: Expr, role: int) -> None:
        """Start copying the rows of half the next tile (none, if it has no tokens)."""
        unit, first = self.next, scalar(half * ROWS)
        row, rows = scalar((unit.row + first).astype("int64")), self.rows(half)
        b, head = self._side(unit.side)

        def source(token: Expr, element: Expr) -> tuple[Any, list[Expr]]:
            return self.sources[role], [b, head, row + token, element]

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
