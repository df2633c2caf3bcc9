"""Weighted sums of a tile's 32 values on tensor cores, on CUDA: the second half of decode attention.

Values are the left operand (16 dims by the tile's tokens), weights the right one (tokens by 8 columns), so sums stand
transposed: registers 4j … 4j+3 of lane (g, t) are dims 16j + g and 16j + 8 + g of columns 2t and 2t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir

from rotquant_tvm.formats import Codec

from .code_fragments_cuda import CodeFragments, fine_grid, load_code_words, words_per_lane
from .cuda_ops import Registers, bits_of, f32, i32, mma_half, mma_int8, pack_half2, prmt, ptx, u32
from .trellis_fragments_cuda import TrellisValues
from .trellis_tables_cuda import TrellisTables, is_trellis

Expr = Any
BASE = 32768.0
"""2^15: a float from it to twice it has eight bits of fraction, so its integer part stands in bytes of its own."""
HIGH_BYTES, LOW_BYTES = 0x0062, 0x0051
"""Which byte of two such floats is the high or the low one of their integer parts."""


class IntegerValues:
    """Values as int8 grid values, weights as 15-bit fixed point in two bytes; int32 sums.

    Groups of up to four queries take the eight columns for high and low bytes; larger ones take two products.
    """

    limit = 32767.0
    """Weights stay below this; the reference moves before."""
    head_room = 1
    """Bits between the largest weight right after a move and the limit."""

    def __init__(self, codec: Codec, shared: Any, lane: Expr, narrow: bool, tables: TrellisTables) -> None:
        self.codec, self.shared, self.lane, self.narrow = codec, shared, lane, narrow
        self.trellis: Any = TrellisValues(codec, tables, lane) if is_trellis(codec) else None
        self.parts = 1 if narrow else 2
        self.blocks = codec.head_dim // 16
        self.sums = Registers(4 * self.blocks * self.parts)
        self.selector = Registers(1)
        self.dither = Registers(4, "float32")
        self.scale = fine_grid(codec.codebook)[1]  # type: ignore[arg-type]

    def start(self) -> None:
        """Clear the sums."""
        self.sums.fill(u32(0))
        # Which byte of a weight the lane's column takes.
        high, low = u32(HIGH_BYTES), u32(LOW_BYTES)
        self.selector[0] = tir.Select(self.lane < 16, high, low) if self.narrow else high
        for i in range(4):
            self.dither[i] = f32(self.lane % 4) * f32(1 / 16) + f32(BASE + (4 * i + 0.5) / 16)

    def load(self, codes: Expr) -> Registers:
        """Load the words of the codes section that begins at this word."""
        bits, head_dim = self.codec.format.bits, self.codec.head_dim
        words = Registers(words_per_lane(bits, head_dim))
        load_code_words(words, self.shared, codes, self.lane, bits, head_dim)
        return words

    def rounded(self, weight: Expr, gain: Expr, k: int) -> Expr:
        """A weight times its value's gain as this product takes it: an integer, in two bytes of a float.

        Fractions are added, others for other pairs of tokens, and what is behind the point then is left unread:
        thousands of tokens far below the largest one would all become 0 otherwise, where together they may outweigh it.
        """
        return weight * gain + self.dither[k // 2]

    def exceeds(self, most: Expr) -> Expr:
        """Whether the largest of the ``rounded`` weights is beyond the limit."""
        return most >= f32(2 * BASE)

    def scaled(self, decays: tuple[Expr, Expr]) -> None:
        """Shrink the sums of columns 2t and 2t + 1."""
        for at in range(0, self.sums.count, 2):
            for column, decay in enumerate(decays):
                whole = Registers(1, "int32")
                ptx("cvt.rni.s32.f32", whole[0], f32(i32(self.sums[at + column])) * decay)
                self.sums[at + column] = u32(whole[0])

    def add(self, words: Registers, weights: Registers) -> None:
        """Add the tile's values by the lane's eight ``rounded`` weights, element 2i + u."""
        book: Any = self.codec.codebook
        fragments = self.trellis.fragments(words) if self.trellis else CodeFragments(words, book, self.codec.head_dim)
        selectors = [self.selector[0]] if self.narrow else [u32(HIGH_BYTES), u32(LOW_BYTES)]
        operands = [[self._bytes(weights, 4 * x, selector) for x in range(2)] for selector in selectors]
        for j in range(self.blocks):
            values = [fragments.half(4 * j + part) for part in range(4)]
            for part, operand in enumerate(operands):
                mma_int8(self.sums, 4 * (part * self.blocks + j), values, operand, b_signed=False)

    @staticmethod
    def _bytes(weights: Registers, at: int, selector: Expr) -> Expr:
        low, high = (prmt(bits_of(weights[at + k]), bits_of(weights[at + k + 1]), selector) for k in (0, 2))
        return prmt(low, high, u32(0x5410))

    def totals(self, j: int) -> list[Expr]:
        """Sums of block j as float32, in the order of the registers; narrow groups: of high or of low bytes."""
        if self.narrow:
            return [f32(i32(self.sums[4 * j + k])) for k in range(4)]
        low = 4 * self.blocks
        return [f32(i32(self.sums[4 * j + k])) * f32(256) + f32(i32(self.sums[low + 4 * j + k])) for k in range(4)]


class HalfValues:
    """Values and weights as float16, float32 sums; columns are queries."""

    limit = 60000.0
    head_room = 2
    scale = 1.0
    narrow = False

    def __init__(self, head_dim: int) -> None:
        self.blocks = head_dim // 16
        self.sums = Registers(4 * self.blocks, "float32")

    def start(self) -> None:
        """Clear the sums."""
        self.sums.fill(f32(0))

    def rounded(self, weight: Expr, gain: Expr | None, k: int) -> Expr:
        """A weight times its value's gain."""
        del k
        return weight if gain is None else weight * gain

    def exceeds(self, most: Expr) -> Expr:
        """Whether the largest weight is beyond the limit."""
        return most > f32(self.limit)

    def scaled(self, decays: tuple[Expr, Expr]) -> None:
        """Shrink the sums of columns 2t and 2t + 1."""
        for at in range(0, self.sums.count, 2):
            for column, decay in enumerate(decays):
                self.sums[at + column] = self.sums[at + column] * decay

    def add(self, fragment: Callable[[int, int, int, int], Expr], weights: Registers) -> None:
        """Add 16 values for every four weights of the lane, element 2i + u.

        ``fragment(j, half, x, pair)``: dim 16j + 8·half + g of tokens 16x + 8·pair + 2t and the next, as one word.
        """
        words = [pack_half2(weights[2 * i], weights[2 * i + 1]) for i in range(weights.count // 2)]
        for j in range(self.blocks):
            for x in range(len(words) // 2):
                values = [fragment(j, half, x, pair) for pair in range(2) for half in range(2)]
                mma_half(self.sums, 4 * j, values, words[2 * x : 2 * x + 2])

    def totals(self, j: int) -> list[Expr]:
        """Sums of block j, in the order of the registers."""
        return [self.sums[4 * j + k] for k in range(4)]


