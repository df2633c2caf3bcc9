"""A cache with a policy as a stream of tiles into the CPU attention core: tiles, sinks and the 16-bit ring."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.ops.segments import Segments
from rotquant_tvm.ops.vector_code import register

from .attention_core_llvm import AttentionCore, wide
from .chunk_source_llvm import ChunkSource
from .packed_source_llvm import PackedSource
from .vector_ops import LANES, cast, lane_numbers, splat

Expr = Any
ZERO = tir.const(0, "int32")


class SegmentStream:
    """Feeds the tokens of one sequence and head to ``core``; create it where its scratch should be allocated."""

    def __init__(self, core: AttentionCore, segments: Segments, target: tvm.target.Target) -> None:
        self.core, self.segments, self.policy = core, segments, segments.policy
        self.packed = PackedSource(core, segments.codecs, segments.layout, target)
        self.rows = SegmentRows(core, segments)

    def feed(
        self,
        where: tuple[Expr, Expr],
        stored: Expr,
        window: tuple[Expr, Any],
        split: Expr = ZERO,
        splits: int = 1,
    ) -> None:
        """Take in positions up to ``stored - 1``; ``window``: the oldest one that any row sees, and that of a row.

        A split takes its share of the tiles; the first takes the sinks too, the last the ring.
        """
        b, head = where
        first, oldest = window
        sinks = self.policy.sinks
        packed = register(self.segments.packed(b, stored))
        begin, tiles, share = tile_share(packed, first, sinks, splits)
        with T.serial(0, tir.max(share, ZERO)) as step:
            tile = register(begin + split * share + step)
            with T.If(tile < tiles), T.Then():
                place = self.segments.place(tile)
                if self.policy.center:
                    feed_centre(self.core, self.segments, where, place, step == 0)
                self.packed.load(self.segments.cache, [b, head, place])
                self.core.tile(tile * TOKENS + sinks, oldest, lambda _: packed + (sinks - 1))
        if self.policy.segmented:
            self.core.no_centre()
            self.rows.feed(where, stored, packed, window, (split == 0, split == splits - 1))


class SegmentRows:
    """Feeds the 16-bit rows of one sequence and head to ``core``: sinks and ring."""

    def __init__(self, core: AttentionCore, segments: Segments) -> None:
        self.core, self.segments, self.policy = core, segments, segments.policy
        self.rows = ChunkSource(core, None, None)

    def feed(
        self,
        where: tuple[Expr, Expr],
        stored: Expr,
        packed: Expr,
        window: tuple[Expr, Any],
        mine: tuple[Expr | bool, Expr | bool] = (True, True),
    ) -> None:
        """Take in the sinks and the ring, each if it is ``mine``; of ``stored`` tokens ``packed`` are in tiles."""
        first, oldest = window
        sinks = self.policy.sinks
        if sinks:
            held = register(tir.min(stored, tir.const(sinks, "int32")))
            with T.If(tir.all(mine[0], first < held)), T.Then(), T.serial(0, -(-sinks // TOKENS)) as tile:
                self._load_rows(where, lambda token: tir.min(tile * TOKENS + token, tir.const(sinks - 1, "int32")))
                self.core.tile(tile * TOKENS, oldest, lambda _: held - 1)
        if self.policy.ring:
            self._feed_ring(where, stored, packed, window, mine[1])

    def _feed_ring(
        self, where: tuple[Expr, Expr], stored: Expr, packed: Expr, window: tuple[Expr, Any], mine: Expr | bool
    ) -> None:
        first, oldest = window
        sinks, ring = self.policy.sinks, self.policy.ring
        begin = register(tir.max(packed, first - sinks) // TOKENS)
        count = register(tir.max((stored - sinks + (TOKENS - 1)) // TOKENS - begin, ZERO))

        def low(row: Expr) -> Expr:
            return tir.max(oldest(row), packed + sinks)

        with T.If(mine), T.Then(), T.serial(0, count) as step:
            base = register((begin + step) * TOKENS)
            turn = register(base % ring)

            def slot(token: Expr) -> Expr:
                return tir.Select(turn + token >= ring, turn + token - ring, turn + token) + sinks

            self._load_rows(where, slot)
            self.core.tile(base + sinks, low, lambda _: stored - 1)

    def _load_rows(self, where: tuple[Expr, Expr], slot: Any) -> None:
        b, head = where
        plain = self.segments.plain
        self.rows.load_rows(lambda role, token, dim: wide(plain, [b, head, role, slot(token)], dim))


def tile_share(packed: Expr, oldest: Expr, sinks: int, splits: int) -> tuple[Expr, Expr, Expr]:
    """The first tile that holds what position ``oldest`` and later ones need, the end of the tiles, a split's share."""
    tiles = register((packed + (TOKENS - 1)) // TOKENS)
    begin = register(tir.max(oldest - sinks, ZERO) // TOKENS)
    return begin, tiles, register((tiles - begin + (splits - 1)) // splits)


def feed_centre(core: Any, segments: Segments, where: tuple[Expr, Expr], tile: Expr, first: Expr) -> None:
    """Have ``core`` take the centre of a block at its first tile in the arrays, or at the ``first`` tile of a share."""
    b, head = where
    tiles = segments.policy.center // TOKENS
    centre = segments.centre
    block = tile // tiles
    scale = tir.reinterpret("float32", centre[b, head, block, centre.shape[3] - 1])

    def load(dim: Expr) -> Expr:
        at = splat(dim.astype("int32") // 4, "int32") + tir.floordiv(lane_numbers(), splat(4, "int32"))
        bytes_ = centre[b, head, block, at]
        shift = splat(8, "int32") * (splat(3, "int32") - tir.floormod(lane_numbers(), splat(4, "int32")))
        signed = cast(bytes_, "int32") << shift
        return cast(signed >> splat(24, "int32"), "float32") * tir.Broadcast(scale, LANES)

    with T.If(tir.any(tile % tiles == 0, first)), T.Then():
        core.take_centre(load)
