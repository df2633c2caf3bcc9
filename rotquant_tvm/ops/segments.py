"""Reading a cache with a policy: sinks, packed tiles and the 16-bit ring as streams of 32 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from ..formats import TOKENS, Codec, TileLayout
from ..formats.centre import centre_words
from .centre import centre_element
from .dequantize import TileReader
from .online_softmax import OnlineSoftmax
from .vector_code import f32, register

Expr = Any
ZERO = tir.const(0, "int32")


def segment_arguments(layout: TileLayout, policy: CachePolicy, batch: Expr, kv_heads: int, tiles: Expr) -> list[Any]:
    """Declare the arrays of a cache.

    They are cache uint32 [batch, kv_heads, tiles, tile_bytes/4] and, with a policy, centre uint32 [batch, kv_heads,
    blocks, head_dim/4 + 1] (``formats.centre``; only if it centres K), plain float16 [batch, kv_heads, 2, sinks +
    ring, head_dim] and packed int32 [batch].
    """
    cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, layout.tile_bytes // 4), "uint32"))
    if not policy.segmented:
        return [cache]
    centre = []
    if policy.center:
        blocks = tir.Var("blocks", "int64")
        centre = [T.arg("centre", T.buffer((batch, kv_heads, blocks, centre_words(layout.head_dim)), "uint32"))]
    slots = policy.slots
    plain = T.arg("plain", T.buffer((batch, kv_heads, 2, slots, layout.head_dim), "float16"))
    return [cache, *centre, plain, T.arg("packed", T.buffer((batch,), "int32"))]


@dataclass(frozen=True)
class Segments:
    """The arrays of ``segment_arguments`` and what is in them; ``wraps``: tiles and centres are rings."""

    arrays: Sequence[Any]
    codecs: tuple[Codec, Codec]
    layout: TileLayout
    policy: CachePolicy
    wraps: bool = False

    @property
    def cache(self) -> Any:
        """The packed tiles."""
        return self.arrays[0]

    @property
    def centre(self) -> Any:
        """The mean keys of the blocks; only if the policy centres K."""
        return self.arrays[1]

    @property
    def plain(self) -> Any:
        """The 16-bit rows."""
        return self.arrays[-2]

    def packed(self, b: Expr, stored: Expr) -> Expr:
        """How many of the first ``stored`` tokens of a sequence lie in tiles."""
        capacity = (self.cache.shape[2] * TOKENS).astype("int32")
        if not self.policy.segmented:
            return stored if self.wraps else tir.min(stored, capacity)
        behind = tir.max(stored - self.policy.sinks, ZERO)
        packed = tir.min(self.arrays[-1][b], behind)
        return packed if self.wraps else tir.min(packed, capacity)

    def place(self, tile: Expr) -> Expr:
        """Where in the arrays a sequence's tile number ``tile`` stands."""
        return register(tile % self.cache.shape[2].astype(tile.ty.dtype)) if self.wraps else tile

    def tile_element(self, role: int, at: tuple[Expr, Expr, Expr], token: Expr, dim: Expr) -> Expr:
        """The dequantized element of a tile, its centre added back."""
        value = TileReader(self.cache, self.codecs[role], self.layout, "kv"[role]).value(at, token, dim)
        if role or not self.policy.center:
            return value
        b, head, tile = at
        return value + centre_element(self.centre, (b, head, tile // (self.policy.center // TOKENS)), dim)

    def slot(self, number: Expr) -> Expr:
        """Where in ``plain`` a token of the ring stands; ``number`` counts behind the sinks."""
        return tir.max(number, tir.const(0, number.ty.dtype)) % max(1, self.policy.ring) + self.policy.sinks

    def stream(
        self,
        state: OnlineSoftmax,
        where: tuple[Expr, Expr],
        stored: Expr,
        oldest: Expr,
        split: Expr = ZERO,
        splits: int = 1,
    ) -> None:
        """Feed positions ``oldest`` … ``stored - 1`` (int32) to the softmax; a split takes its share of the tiles.

        Loops that may be empty, not conditions: the compiler puts no barrier inside a condition.
        """
        b, head = where
        sinks = self.policy.sinks
        packed = register(self.packed(b, stored))
        begin = register(tir.max(oldest - sinks, ZERO) // TOKENS)
        share = register(((packed + (TOKENS - 1)) // TOKENS - begin + (splits - 1)) // splits)
        start = register(begin + split * share)
        count = tir.max(tir.min(share, (packed + (TOKENS - 1)) // TOKENS - start), ZERO)
        with T.serial(0, register(count)) as step:
            tile = start + step
            at = (b, head, self.place(tile))
            state.tile(
                lambda token, dim: self.tile_element(0, at, token, dim),
                lambda token, dim: self.tile_element(1, at, token, dim),
                lambda token: tir.all(tile * TOKENS + token < packed, tile * TOKENS + token + sinks >= oldest),
            )
        if self.policy.segmented:
            self._stream_plain(state, where, stored, oldest, packed, split, splits)

    def _stream_plain(
        self,
        state: OnlineSoftmax,
        where: tuple[Expr, Expr],
        stored: Expr,
        oldest: Expr,
        packed: Expr,
        split: Expr,
        splits: int,
    ) -> None:
        """The first split takes the sinks, the last one the ring."""
        b, head = where
        sinks = self.policy.sinks

        def rows(role: int, slot: Expr, dim: Expr) -> Expr:
            return f32(self.plain[b, head, role, slot, dim])

        if sinks:
            held = register(tir.min(stored, tir.const(sinks, "int32")))
            count = tir.Select(tir.all(split == 0, oldest < held), (held + (TOKENS - 1)) // TOKENS, ZERO)
            with T.serial(0, register(count)) as tile:

                def place(token: Expr, tile: Expr = tile) -> Expr:
                    return tir.min(tile * TOKENS + token, tir.const(sinks - 1, "int32"))

                state.tile(
                    lambda token, dim: rows(0, place(token), dim),
                    lambda token, dim: rows(1, place(token), dim),
                    lambda token: tir.all(tile * TOKENS + token < held, tile * TOKENS + token >= oldest),
                )
        if not self.policy.ring:
            return
        first = register(tir.max(packed, oldest - sinks))
        count = tir.Select(
            tir.all(split == splits - 1, stored - sinks > first),
            (stored - sinks + (TOKENS - 1)) // TOKENS - first // TOKENS,
            ZERO,
        )
        with T.serial(0, register(count)) as step:
            base = (first // TOKENS + step) * TOKENS
            state.tile(
                lambda token, dim: rows(0, self.slot(base + token), dim),
                lambda token, dim: rows(1, self.slot(base + token), dim),
                lambda token: tir.all(base + token >= first, base + token < stored - sinks),
            )
