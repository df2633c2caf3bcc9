"""The packed tiles of a cache in decode attention, on CUDA: a warp's stream of tiles against its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TOKENS, Codec, TileLayout

from .cuda_ops import Registers, f32, half2, i32, load_words, scalar, u32
from .decode_scores_cuda import HalfScores, IntegerScores
from .decode_softmax_cuda import HIDDEN, Weights
from .decode_values_cuda import HalfValues, IntegerValues
from .linear_halves_cuda import LinearKeys, LinearValues
from .tile_centres_cuda import TileCentres
from .tile_ring_cuda import TileRing
from .trellis_fragments_cuda import TrellisValues
from .trellis_tables_cuda import TrellisTables, is_trellis

Expr = Any


@dataclass
class Share:
    """A warp's share of a sequence: tiles ``first``, ``first + step``, … of those before token ``packed``.

    ``oldest``: the first token behind the sinks that is attended to. All int32.
    """

    first: Expr
    step: Expr
    packed: Expr
    oldest: Expr


class PackedStream:
    """Streams tiles through the scores of K's format and the sums of V's; ``wraps``: the cache is a ring of tiles."""

    def __init__(
        self,
        codecs: tuple[Codec, Codec],
        layout: TileLayout,
        policy: CachePolicy,
        ring: TileRing,
        narrow: bool,
        tables: TrellisTables,
        wraps: bool = False,
        centres: TileCentres | None = None,
    ) -> None:
        self.layout, self.policy, self.ring, self.wraps, self.centres = layout, policy, ring, wraps, centres
        self.head_dim = layout.head_dim
        shared, lane = ring.shared, ring.lane
        self.codecs = key, value = codecs
        self.keys: Any = HalfScores(self.head_dim)
        if integer(key):
            self.keys = IntegerScores(key, shared, lane, tables)
        self.values: Any = HalfValues(self.head_dim)
        if integer(value):
            self.values = IntegerValues(value, shared, lane, narrow, tables)
        self.weights = Weights(self.values)

    def word(self, section: str) -> int:
        """The first word of a section of a tile."""
        return self.layout.sections[section].offset // 4

    def place(self, j: int, half: int) -> Expr:
        """The dim of the lane's row of block j of the sums: g (``half`` 0) or g + 8 of the product's."""
        if is_trellis(self.codecs[1]):
            return TrellisValues.place(self.ring.lane, j, half)
        return 16 * j + 8 * half + self.ring.lane // 4

    def begin(self, cache: Any, where: tuple[Expr, Expr], share: Share) -> None:
        """Begin to copy the warp's tiles of one (sequence, kv head)."""
        self._share = share
        self._tiles = scalar(i32(cache.shape[2])) if self.wraps else None
        self._source = lambda number, word: cache.ptr_to([*where, self._place(share, number), word])

        def exists(number: Any) -> Expr:
            return (share.first + number * share.step) * TOKENS < share.packed

        def begin_centres() -> None:
            if self.centres is not None:
                tiles = self.policy.center // TOKENS
                self.centres.begin(lambda number: self._place(share, number) // tiles, exists)

        self.ring.start(self._source, exists, begin_centres)
        # Only then, since it takes a division.
        left = (share.packed + (TOKENS - 1)) // TOKENS - share.first
        self._count = scalar(tir.max(left + (share.step - 1), i32(0)) // share.step)

    def _place(self, share: Share, number: Expr) -> Expr:
        """Where in the cache the stream's tile ``number`` stands."""
        tile = share.first + number * share.step
        return tile if self._tiles is None else tile % self._tiles

    def stream(self) -> None:
        """Take in the tiles, once the queries are at hand (``keys.start``)."""
        ring, lane, share, source = self.ring, self.ring.lane, self._share, self._source
        self.weights.start()
        with T.serial(0, self._count) as number:
            start = scalar(ring.wait())
            tile = scalar(share.first + number * share.step)
            offset = None if self.centres is None else self.centres.score(self.keys, number)
            scores = self._scores(start, offset)
            gains = self._gains(start)
            held = self.values.load(start + self.word("v_codes")) if integer_values(self.values) else None
            edge = tir.Or((tile + 1) * TOKENS > share.packed, tile * TOKENS < share.oldest)
            with T.If(edge), T.Then():
                self._hide(scores, gains, tile, share)
            weights = self.weights.take(scores, gains, lane)
            if held is None:
                self._add_halves(start, weights, edge, tile, share)
            # Not before: the loads of the tile's last words, which it waits for, are on their way meanwhile.
            ring.refill(source, number + ring.depth, self._count)
            if held is not None:
                self.values.add(held, weights)
            ring.advance()

    def _scores(self, start: Expr, offset: Expr | None) -> Registers:
        if not isinstance(self.keys, HalfScores):
            return self.keys.tile(start + self.word("k_codes"), start + self.word("k_gains"), offset)
        fragment = self._key_halves(start)
        scores = Registers(8, "float32")
        for i in range(4):
            pair = self.keys.octet(lambda step, i=i: fragment(i, step))
            scores[2 * i], scores[2 * i + 1] = pair
        return scores

    def _key_halves(self, start: Expr) -> Any:
        """(i, step) -> elements 16·step + 4t + 0 … 3 of the tile's token 8i + g, as two words of float16."""
        codes, steps = start + self.word("k_codes"), self.head_dim // 16
        if self.codecs[0].format.codebook == "linear":
            words = codes, start + self.word("k_gains")
            return LinearKeys(self.codecs[0], self.ring.shared, words, self.ring.lane).fragment
        chunks = _Chunks(self.ring.shared, codes, self.ring.lane)
        return lambda i, step: chunks.words(2 * (i * steps + step), 2)

    def _value_halves(self, start: Expr) -> Any:
        """(j, half, x, pair) -> dim 16j + 8·half + g of tokens 16x + 8·pair + 2t and the next, as a word of float16."""
        codes = start + self.word("v_codes")
        if self.codecs[1].format.codebook == "linear":
            words = codes, start + self.word("v_gains")
            return LinearValues(self.codecs[1], self.ring.shared, words, self.ring.lane).fragment
        chunks = _Chunks(self.ring.shared, codes, self.ring.lane)
        return lambda j, half, x, pair: chunks.words(4 * (2 * j + x) + 2 * half + pair, 1)[0]

    def _gains(self, start: Expr) -> Registers | None:
        """The gains of the lane's eight values, element 2i + u."""
        if not integer_values(self.values):
            return None
        words, gains = Registers(4), Registers(8, "float32")
        load_words(words, 0, self.ring.shared, [start + self.word("v_gains") + self.ring.lane % 4 * 4], 4, "shared")
        for i in range(4):
            gains[2 * i], gains[2 * i + 1] = half2(words[i])
        return gains

    def _attended(self, token: Expr, tile: Expr, share: Share) -> Expr:
        at = tile * TOKENS + token
        return (at < share.packed) & (at >= share.oldest)

    def _hide(self, scores: Registers, gains: Registers | None, tile: Expr, share: Share) -> None:
        """Tokens that are not attended to: their gains may be anything that once stood there."""
        for k in range(8):
            seen = self._attended(8 * (k // 2) + 2 * (self.ring.lane % 4) + k % 2, tile, share)
            scores[k] = tir.Select(seen, scores[k], f32(HIDDEN))
            if gains is not None:
                gains[k] = tir.Select(seen, gains[k], f32(0))

    def _add_halves(self, start: Expr, weights: Registers, edge: Expr, tile: Expr, share: Share) -> None:
        value = self._value_halves(start)
        t = self.ring.lane % 4
        masks = Registers(4)
        masks.fill(u32(0xFFFFFFFF))
        with T.If(edge), T.Then():  # 0 times what is not finite would not be 0
            for at in range(4):
                token = 8 * at + 2 * t
                low, high = (self._attended(token + u, tile, share) for u in range(2))
                masks[at] = tir.Select(low, u32(0xFFFF), u32(0)) | tir.Select(high, u32(0xFFFF0000), u32(0))

        def fragment(j: int, half: int, x: int, pair: int) -> Expr:
            return value(j, half, x, pair) & masks[2 * x + pair]

        self.values.add(fragment, weights)


class _Chunks:
    """Words of a 16-bit codes section, loaded 16 bytes at a time when first asked for."""

    def __init__(self, shared: Any, start: Expr, lane: Expr) -> None:
        self.shared, self.start, self.lane = shared, start, lane
        self._chunk, self._words = -1, None

    def words(self, first: int, count: int) -> list[Expr]:
        """Words ``first`` …; ask in rising order, so that few are held at a time."""
        if first // 4 != self._chunk:
            self._chunk, self._words = first // 4, Registers(4)
            load_words(self._words, 0, self.shared, [self.start + 128 * self._chunk + 4 * self.lane], 4, "shared")
        return [self._words[first % 4 + k] for k in range(count)]  # type: ignore[index]


def integer(codec: Codec) -> bool:
    """Whether a codec's values are int8 grid values times one gain."""
    return codec.format.codebook in ("lloyd", "trellis")


def integer_values(values: Any) -> bool:
    """Whether values are summed as integers."""
    return isinstance(values, IntegerValues)
