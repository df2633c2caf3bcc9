"""Codes of q8_0 and q4_0 as float16 operands of the tensor cores, on CUDA: integers times their block's gain.

A lane's four int8 of a half become two words of two float16. A byte under the exponent of 1024 is the number 1024 +
byte, so that one permute and one subtraction convert two; one product applies the gains.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rotquant_tvm.formats import LINEAR_BLOCK, NIBBLE_ZERO, Codec

from .code_fragments_cuda import CodeFragments, load_code_words, words_per_lane
from .cuda_ops import Registers, load_words, prmt, ptx, scalar, u32

Expr = Any
OFFSET = 0x80808080
"""Exclusive or with it adds 128 to four int8, as uint8."""
EXPONENT = 0x64646464
"""High bytes of float16 from 1024 on."""
ZERO = 0x64806480
"""Two float16 of 1024 + 128, what an int8 of 0 becomes."""


class LinearCodes:
    """The int8 of a lane's halves: element ``number`` as in ``CodeFragments.half``."""

    def __init__(self, codec: Codec, shared: Any, start: Expr, lane: Expr) -> None:
        """``start``: the first word of the codes section in ``shared``."""
        self.bits = codec.format.bits
        self._words = Registers(words_per_lane(self.bits, codec.head_dim))
        load_code_words(self._words, shared, start, lane, self.bits, codec.head_dim)
        integers = (np.arange(16) - NIBBLE_ZERO).astype(np.int8)
        self._fragments = CodeFragments.of_values(self._words, integers, codec.head_dim) if self.bits == 4 else None

    def half(self, number: int) -> Expr:
        """Four codes, one register."""
        return self._words[number] if self._fragments is None else self._fragments.half(number)


class BlockGains:
    """Gains per block of 32 dims: row ``block`` of a gains section that begins at word ``start``."""

    def __init__(self, shared: Any, start: Expr, place: Expr) -> None:
        """``place``: which of the eight groups of four words the lane wants, tokens 8i + 2·place and the next."""
        self._shared, self._start, self._place = shared, start, place
        self._known: dict[int, Registers] = {}

    def words(self, block: int) -> Registers:
        """Gains of tokens 8i + 2·place + u, two in each of four words i; loaded when first asked for."""
        if block not in self._known:
            self._known[block] = Registers(4)
            load_words(self._known[block], 0, self._shared, [self._start + 16 * block + 4 * self._place], 4, "shared")
        return self._known[block]


def block_of(sixteen: int) -> int:
    """The block of 32 that dims 16·sixteen … lie in."""
    return 16 * sixteen // LINEAR_BLOCK


def halves(codes: Expr, pair: int, gains: Expr) -> Expr:
    """Codes 2·pair and 2·pair + 1 of four int8, as two float16, times the two gains of a word."""
    shifted = scalar(codes ^ u32(OFFSET))
    raised = prmt(shifted, u32(EXPONENT), u32(0x4140 if pair == 0 else 0x4342))
    cell = Registers(1)
    ptx("sub.rn.f16x2", cell[0], raised, u32(ZERO))
    ptx("mul.rn.f16x2", cell[0], cell[0], gains)
    return cell[0]


class LinearKeys:
    """A tile's keys: the lane's token 8i + g, whose gain stands in one half of a word."""

    def __init__(self, codec: Codec, shared: Any, words: tuple[Expr, Expr], lane: Expr) -> None:
        """``words``: where the codes and the gains begin."""
        self._codes = LinearCodes(codec, shared, words[0], lane)
        self._gains = BlockGains(shared, words[1], lane // 8)
        self._selector = scalar(u32(lane // 4 % 2) * u32(0x2222) + u32(0x1010))
        self._steps = codec.head_dim // 16

    def fragment(self, i: int, step: int) -> list[Expr]:
        """Elements 16·step + 4t + 0, 1 and + 2, 3 of token 8i + g, as two words."""
        word = self._gains.words(block_of(step))[i]
        gain = prmt(word, word, self._selector)
        codes = self._codes.half(i * self._steps + step)
        return [halves(codes, pair, gain) for pair in range(2)]


class LinearValues:
    """A tile's values: a word holds two tokens of one dim, whose gains are two halves of a word too."""

    def __init__(self, codec: Codec, shared: Any, words: tuple[Expr, Expr], lane: Expr) -> None:
        """``words``: where the codes and the gains begin."""
        self._codes = LinearCodes(codec, shared, words[0], lane)
        self._gains = BlockGains(shared, words[1], lane % 4)

    def fragment(self, j: int, half: int, x: int, pair: int) -> Expr:
        """Dim 16j + 8·half + g of tokens 16x + 8·pair + 2t and the next, as one word."""
        gains = self._gains.words(block_of(j))[2 * x + pair]
        return halves(self._codes.half(2 * (2 * j + x) + half), pair, gains)
