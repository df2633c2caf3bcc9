"""One tile of a cache, written by one warp on CUDA: rotate, quantize, pack, store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import HALF_MAX, Codec, TileLayout

from .block_codes_cuda import BlockCodes
from .cuda_ops import Registers, i32, scalar, u32
from .tile_codes_cuda import Guard, HalfTileCodes, encode_half_tile
from .tile_lane_cuda import Lane
from .tile_pack_cuda import TileStores
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, HalfTileRows, clip

Expr = Any


class TileEncoder:
    """Emits the work of one role; ``rotation`` has been prepared.

    ``early``: norms come first (``block_codes_cuda``).
    """

    def __init__(
        self,
        cache: Any,
        layout: TileLayout,
        codec: Codec,
        rotation: TileRotation,
        lane: Expr,
        early: bool = False,
    ) -> None:
        self.codec, self.rotation = codec, rotation
        self.order = Lane(rotation.role, codec.head_dim, lane)
        self.stores = TileStores(cache, layout, self.order)
        self.wide = codec.format.bits == 16
        self.blocks = BlockCodes(codec, rotation, self.order, cache.shape[2] > 0) if early else None

    def encode(
        self,
        at: tuple[Expr, ...],
        tokens: tuple[Expr, Expr],
        fetch: Callable[[Expr], HalfTileRows],
        release: Callable[[Expr], None],
        adjust: Callable[[Registers], None] | None = None,
    ) -> None:
        """Write tokens ``tokens[0]`` … ``tokens[1] - 1`` (int32, of 0 … 32) of the tile at ``at``, and no others.

        ``fetch(half)`` waits for the rows of half a tile, ``release(half)`` says that they have been read. ``adjust``
        changes the rotated values.
        """
        first, last = tokens
        whole = scalar(tir.all(first == 0, last == 2 * ROWS).astype("int32"))

        def written(token: Expr) -> Expr:
            return tir.all(token >= first, token < last)

        each = {8: 2, 16: 0}.get(self.codec.format.bits, 1)
        older, newer = (Registers(max(1, self.order.blocks * each)) for _ in range(2))
        newer.fill(u32(0))
        with T.serial(0, 2) as half:
            if not self.wide:
                for index in range(newer.count):
                    older[index] = newer[index]
            rows = fetch(half)
            # The codes of a half without new tokens are not stored.
            new = scalar(tir.all(half * ROWS < last, half * ROWS + ROWS > first).astype("int32"))

            def store(codes: HalfTileCodes, half: Expr = half) -> None:
                _when(whole, lambda w: self._store_half(at, i32(half), codes, w), written)
                if not self.wide:
                    for index, word in enumerate(codes.groups):
                        newer[index] = word

            if self.blocks is not None:
                self._early_half(self.blocks, rows, new, store, lambda half=half: release(half))
            else:
                with T.If(new != 0), T.Then():
                    store(self._half(rows, adjust))
                release(half)
        if not self.wide:
            halves = [list(older), list(newer)]
            _when(whole, lambda w: self.stores.codes(at, halves, w), written)

    def _early_half(
        self,
        blocks: BlockCodes,
        rows: HalfTileRows,
        new: Expr,
        store: Callable[[HalfTileCodes], None],
        release: Callable[[], None],
    ) -> None:
        """Half a tile whose norms come first: its rows are held, and need not stay where they are."""
        operands = blocks.read(rows)
        if operands.outside is None:
            release()
            with T.If(new != 0), T.Then():
                store(blocks.encode(operands))
            return
        groups, gains = Registers(self.order.blocks), Registers(self.order.slots)

        def keep(codes: HalfTileCodes) -> None:
            for kept, values in ((groups, codes.groups), (gains, codes.gains[0])):
                for index, value in enumerate(values):
                    kept[index] = value

        with T.If(operands.outside != 0):
            with T.Then():
                values = Registers(self.codec.head_dim // 2, "float32")
                self.rotation.repair(values, rows, self.order)
                keep(encode_half_tile(self.codec, self.order, values, None))
                release()
            with T.Else():
                release()
                keep(blocks.encode(operands))
        with T.If(new != 0), T.Then():
            store(HalfTileCodes(list(groups), [list(gains)]))

    def _half(self, rows: HalfTileRows, adjust: Callable[[Registers], None] | None) -> HalfTileCodes:
        values = Registers(self.codec.head_dim // 2, "float32")
        self.rotation.apply(values, rows, self.order)
        if adjust is not None:
            adjust(values)
        return encode_half_tile(self.codec, self.order, values, self._guard(values, rows, adjust))

    def _guard(self, values: Registers, rows: HalfTileRows, adjust: Callable[[Registers], None] | None) -> Guard | None:
        """How values beyond the range are found and what is done then; None where there can be none."""
        if self.rotation.plain or adjust is not None:

            def clip_values() -> None:
                for index in range(values.count):
                    values[index] = clip(values[index])

            return None if adjust is None else Guard(HALF_MAX**2, clip_values)
        if rows.proof is None:
            return None
        return Guard(rows.proof, lambda: self.rotation.repair(values, rows, self.order))

    def _store_half(self, at: tuple[Expr, ...], half: Expr, codes: HalfTileCodes, written: Any) -> None:
        if codes.own is not None:
            self.stores.own_gain(at, half, codes.own, written)
        for row, gains in enumerate(codes.gains):
            self.stores.gains(at, half, row, gains, written)
        if self.wide:
            for group in range(self.order.blocks):
                words = codes.groups[4 * group : 4 * group + 4]
                self.stores.wide_codes(at, half, group, words, written)


def _when(whole: Expr, emit: Callable[[Any], None], written: Callable[[Expr], Expr]) -> None:
    """Emit the stores of whole tiles, and those that keep the bits of other tokens."""
    with T.If(whole != 0):
        with T.Then():
            emit(None)
        with T.Else():
            emit(written)
