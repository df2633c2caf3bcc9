"""Scores of a group of queries against a tile's 32 keys on tensor cores, on CUDA.

Lane (g, t) = (lane >> 2, lane & 3) ends with eight scores: those of query row g (or g mod 4 for groups of up to four)
and tokens 8i + 2t + u. The sixteen rows of an operand hold eight queries twice, a coarse part and the remainder, so
that the two accumulators a lane gets for a token make one precise score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir

from rotquant_tvm.formats import Codec

from .code_fragments_cuda import CodeFragments, fine_grid, load_code_words, words_per_lane
from .cuda_ops import (
    Registers,
    across,
    f32,
    half2,
    i32,
    load_words,
    mma_half,
    mma_int8,
    pack_half2,
    ptx,
    scalar,
    shuffle,
    u32,
)
from .trellis_fragments_cuda import TrellisKeys
from .trellis_tables_cuda import TrellisTables, is_trellis

Expr = Any
LoadQuery = Callable[[int], list[Expr]]
"""(sixteen) -> the lane's four query elements 16·sixteen + 4t + 0 … 3, as float32."""
FINEST = 16256.0
"""Queries are rounded to ±16256 = 127·128: an int8 of 128ths and an int8 remainder."""


class IntegerScores:
    """Keys as int8 grid values: products of integers, exact but for the rounding of the queries to 15 bits."""

    def __init__(self, codec: Codec, shared: Any, lane: Expr, tables: TrellisTables) -> None:
        self.codec, self.shared, self.lane = codec, shared, lane
        self.trellis: Any = TrellisKeys(codec, tables, lane) if is_trellis(codec) else None
        self.steps = codec.head_dim // 16
        self.coarse, self.fine = Registers(self.steps), Registers(self.steps)
        self.unit = Registers(1, "float32")

    def start(self, load: LoadQuery, scale: float) -> None:
        """Round the queries; ``scale`` is the softmax scale in units of log2."""
        values = Registers(4 * self.steps, "float32")
        most = f32(0)
        for step in range(self.steps):
            for e, value in enumerate(load(step)):
                values[4 * step + e] = value
                most = scalar(tir.max(most, tir.abs(values[4 * step + e])))
        most = across(most, tir.max, (1, 2))
        finest, self.unit[0] = rounding(most, scale)
        for step in range(self.steps):
            elements = [values[4 * step + e] for e in range(4)]
            self.coarse[step], self.fine[step] = rounded_words(elements, finest)

    def _operand(self, step: int) -> list[Expr]:
        """Query elements 16·step … as rows 0-7 (coarse) and 8-15 (fine), for 32 elements or the last 16."""
        pair = [self.coarse[step], self.fine[step]]
        if step + 1 == self.steps:
            return pair
        return [*pair, self.coarse[step + 1], self.fine[step + 1]]

    def _times(self, fragment: Callable[[int], Expr]) -> Registers:
        sums = Registers(4)
        sums.fill(u32(0))
        for step in range(0, self.steps, 2):
            mma_int8(sums, 0, self._operand(step), [fragment(s) for s in range(step, min(step + 2, self.steps))])
        return sums

    @staticmethod
    def _joined(sums: Registers, column: int) -> Expr:
        return f32(i32(sums[column]) * i32(128) + i32(sums[2 + column]))

    def tile(self, codes: Expr, gains: Expr, offset: Expr | None = None) -> Registers:
        """The eight scores of a tile whose codes and gains begin at these words: element 2i + u.

        ``offset`` is added to all of them.
        """
        bits, head_dim = self.codec.format.bits, self.codec.head_dim
        words = Registers(words_per_lane(bits, head_dim))
        load_code_words(words, self.shared, codes, self.lane, bits, head_dim)
        gain = Registers(4)
        load_words(gain, 0, self.shared, [gains + self.lane % 4 * 4], 4, "shared")
        book: Any = self.codec.codebook
        fragments = self.trellis.fragments(words) if self.trellis else CodeFragments(words, book, head_dim)
        scores = Registers(8, "float32")
        unit = scalar(self.unit[0] * f32(fine_grid(book)[1]))
        for i in range(4):
            sums = self._times(lambda step, i=i: fragments.half(i * self.steps + step))
            for u, half in enumerate(half2(gain[i])):
                score = self._joined(sums, u) * (half * unit)
                scores[2 * i + u] = score if offset is None else score + offset
        return scores

    def centres(self, words: Registers, scale: Expr) -> tuple[Expr, Expr]:
        """Scores of the lane's query row against two of eight centres, numbers 2t and 2t + 1.

        ``words``: 4·step + t of the int8 codes of centre g; ``scale``: that centre's.
        """
        sums = self._times(lambda step: words[step])
        first = scalar(self.lane % 4 * 8)
        scales = shuffle(scale, first), shuffle(scale, first + 4)
        low, high = (scalar(self._joined(sums, u) * (self.unit[0] * scales[u])) for u in range(2))
        return low, high


def rounding(most: Expr, scale: float) -> tuple[Expr, Expr]:
    """What a row's elements, at most ``most`` large, are to be times to be rounded, and what scores are times then."""
    most = scalar(tir.max(most, f32(1e-20)))
    return scalar(f32(FINEST) / most), scalar(most * f32(scale / FINEST))


def rounded_words(elements: list[Expr], finest: Expr) -> tuple[Expr, Expr]:
    """Four neighbouring elements rounded: a word of their coarse parts, and one of their fine parts."""
    coarse, fine = u32(0), u32(0)
    for e, element in enumerate(elements):
        whole = Registers(1, "int32")
        ptx("cvt.rni.s32.f32", whole[0], element * finest)
        high = scalar((whole[0] + i32(64)) >> i32(7))
        low = whole[0] - (high << i32(7))
        coarse = coarse | u32(high & i32(255)) << u32(8 * e)
        fine = fine | u32(low & i32(255)) << u32(8 * e)
    return coarse, fine


class HalfScores:
    """Keys as float16: the coarse part of a query is its float16, the fine part what that leaves."""

    def __init__(self, head_dim: int) -> None:
        self.steps = head_dim // 16
        self.coarse, self.fine = Registers(2 * self.steps), Registers(2 * self.steps)

    def start(self, load: LoadQuery, scale: float) -> None:
        """Take the queries, times ``scale`` (the softmax scale in units of log2)."""
        for step in range(self.steps):
            values = [scalar(value * f32(scale)) for value in load(step)]
            for pair in range(2):
                word = pack_half2(values[2 * pair], values[2 * pair + 1])
                low, high = half2(word)
                self.coarse[2 * step + pair] = word
                self.fine[2 * step + pair] = pack_half2(values[2 * pair] - low, values[2 * pair + 1] - high)

    def octet(self, fragment: Callable[[int], list[Expr]]) -> tuple[Expr, Expr]:
        """Scores of tokens 8i + 2t and 8i + 2t + 1.

        ``fragment(step)``: token 8i + g, its elements 16·step + 4t + 0, 1 and + 2, 3 as two words.
        """
        sums = Registers(4, "float32")
        sums.fill(f32(0))
        for step in range(self.steps):
            query = [self.coarse[2 * step], self.fine[2 * step], self.coarse[2 * step + 1], self.fine[2 * step + 1]]
            mma_half(sums, 0, query, fragment(step))
        return sums[0] + sums[2], sums[1] + sums[3]
