"""Packed tiles of one sequence and head as blocks for the integer attention core."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, Codec, TileLayout
from rotquant_tvm.ops.segments import Segments
from rotquant_tvm.ops.vector_code import register

from .byte_ops_llvm import has_byte_dot, has_byte_permutes
from .integer_core_llvm import IntegerCore
from .segments_llvm import ZERO, feed_centre, tile_share
from .tile_bytes_llvm import GridBytes
from .tile_values_llvm import TileGains
from .trellis_llvm import TrellisValues
from .vector_ops import CACHE_LINE, lanes, prefetch

Expr = Any


def has_integer_core(codecs: tuple[Codec, Codec], target: tvm.target.Target) -> bool:
    """Whether tiles of these formats can be attended to in integers on this CPU."""
    kinds = {codec.format.codebook for codec in codecs}
    if not has_byte_dot(target) or not kinds <= {"lloyd", "trellis"}:
        return False
    return "trellis" not in kinds or has_byte_permutes(target)


class IntegerStream:
    """Feeds tiles to ``core``; create it where its scratch should be allocated."""

    def __init__(self, core: IntegerCore, segments: Segments, target: tvm.target.Target) -> None:
        self.core, self.segments = core, segments
        pairs = zip(segments.codecs, "kv", strict=True)
        self.sources = [byte_source(codec, segments.layout, role, target) for codec, role in pairs]
        self.tables = [source.table() for source in self.sources]
        self.words = T.alloc_buffer((max(source.scratch_words for source in self.sources) * 32,), "uint32")

    def feed(self, where: tuple[Expr, Expr], stored: Expr, oldest: Expr, split: Expr, splits: int) -> None:
        """Take in a split's share of the tiles that hold positions ``oldest`` … ``stored - 1``."""
        packed = register(self.segments.packed(where[0], stored))
        begin, tiles, share = tile_share(packed, oldest, self.segments.policy.sinks, splits)
        start = register(begin + split * share)
        mine = register(tir.max(tir.min(share, tiles - start), ZERO))
        most = self.core.tiles
        with T.serial(0, (mine + (most - 1)) // most) as block:
            count = register(tir.min(mine - block * most, tir.const(most, "int32")))
            self.core.start_block()
            with T.serial(0, count) as tile:
                self._tile(where, start + block * most, tile, (oldest, packed))
            self.core.finish_block(count)

    def _tile(self, where: tuple[Expr, Expr], start: Expr, tile: Expr, span: tuple[Expr, Expr]) -> None:
        """Unpack tile ``start + tile`` and score its keys; its values stay until the end of the block."""
        policy = self.segments.policy
        number = register(start + tile)
        place = self.segments.place(number)
        if policy.center:
            feed_centre(self.core, self.segments, where, place, tile == 0)
        cache = self.segments.cache
        self._ask_for(cache, where, place + 1)

        def words(first: Expr) -> Expr:
            return cache[where[0], where[1], place, lanes(first)]

        outputs = ((self.core.keys, 0), (self.core.values, tile * (self.core.head_dim * 8)))
        for source, table, (out, first) in zip(self.sources, self.tables, outputs, strict=True):
            source.unpack_bytes(words, table, self.words, out, first)
        gains = [TileGains(self.segments.layout, role) for role in "kv"]
        gains[0].in_token_order(words, self.core.gain_k, self.sources[0].unit)
        gains[1].in_token_order(words, self.core.gain_v, self.sources[1].unit, first=tile * TOKENS)
        oldest, packed = span
        self.core.score(tile, number * TOKENS + policy.sinks, oldest, packed + (policy.sinks - 1))

    def _ask_for(self, cache: Any, where: tuple[Expr, Expr], place: Expr) -> None:
        """Have the next tile on its way from memory; the CPU's own guesses end with a page."""
        last = tir.min(place, cache.shape[2].astype(place.ty.dtype) - 1)
        with T.serial(0, -(-self.segments.layout.tile_bytes // CACHE_LINE)) as line:
            prefetch(cache[where[0], where[1], last, line * (CACHE_LINE // 4)])


def byte_source(codec: Codec, layout: TileLayout, role: str, target: tvm.target.Target) -> GridBytes | TrellisValues:
    """What unpacks the values of a role as bytes."""
    kind = TrellisValues if codec.format.codebook == "trellis" else GridBytes
    return kind(codec, layout, role, target)
