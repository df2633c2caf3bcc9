"""The codes of one packed tile as bytes, for CPU kernels that work on bytes.

The order is that of the tile: vector (2*group + half, s) of 32-bit lanes (g, t) has the elements e as its bytes (see
``formats.packing``). Of keys, the bytes of a row of four lanes are sixteen dims in order; of values, the bytes of a
lane are four tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.tile_pack import PERIOD

from .byte_ops_llvm import BYTES, as_bytes, as_words, has_byte_permutes, look_up_bytes
from .tile_values_llvm import LoadWords, TileValues
from .vector_ops import LANES, lanes, splat

Expr = Any
StoreVector = Callable[[Expr, Expr], None]
GRID_OFFSET = 128
"""What is added to a value of the int8 grid to make it a uint8."""


class CodeBytes(TileValues):
    """Unpacks one role's codes of a tile into bytes. ``layout`` and ``codec`` say how they are stored."""

    @property
    def unit(self) -> float:
        """What a value of 1 on the grid is worth."""
        return float(self.codec.codebook.scale)

    @property
    def ignores_upper_bits(self) -> bool:
        """Whether bits above a code's own may be anything."""
        return False

    def unpack_codes(self, words: Any, store: StoreVector) -> None:
        """Unpack the words that ``_deinterleave`` has left: ``store(4*group + 2*half + s, codes)`` for each vector."""
        section = self.section
        groups = PERIOD[section.bits][1]
        rounds = section.groups // groups
        with T.serial(0, rounds) as index:
            for group, half, s in product(range(groups), range(2), range(2)):
                codes = self._group_codes(_word_reader(words, s), index, group, half)
                store((index * groups + group) * 4 + half * 2 + s, codes)
        for group, half, s in product(range(section.groups - rounds * groups), range(2), range(2)):
            codes = self._tail_codes(_word_reader(words, s), group, half)
            store((rounds * groups + group) * 4 + half * 2 + s, codes)

    def _group_codes(self, word: Callable[[Expr], Expr], index: Expr, group: int, half: int) -> Expr:
        """The codes of a half of group number ``group`` of a period of words, as bytes."""
        bits = self.section.bits
        if bits == 1:
            return self._spread(word(index), group, half, 1)
        if bits == 2:
            return self._spread(word(index), 2 * group, half, 3)
        if bits == 4:
            high = _shifted(word(index), 0 if half else 4) & splat(0x08080808, "uint32")
            return self._spread(word(index), 0, half, 7) | high
        if group < 3:
            return self._spread(word(index * 3 + group), 0, half, 7)
        planes = [_shifted(word(index * 3 + b), 3 - b) & splat(0x11111111 << b, "uint32") for b in range(3)]
        return self._spread(planes[0] | planes[1] | planes[2], 0, half, 7)

    def _tail_codes(self, word: Callable[[Expr], Expr], group: int, half: int) -> Expr:
        """The codes of one of the two groups that 1 and 3 bits may leave over: they end in a half-word."""
        words = self.section.words
        bits = _shifted(word(words), 8 * group + 4 * half) & splat(0xF, "uint32")
        top = bits * splat(0x00204081, "uint32") & splat(0x01010101, "uint32")  # bit e goes to byte e
        if self.section.bits == 1:
            return top
        return self._spread(word(words - 1), 2 * group, half, 3) | top << splat(2, "uint32")

    def _spread(self, word: Expr, shift: int, half: int, mask: int) -> Expr:
        """A byte from each nibble of a half of the words: its bits from ``shift`` on, as far as ``mask`` goes."""
        if has_byte_permutes(self.target):
            offsets = sum(32 * (k // 4) + 16 * half + 4 * (k % 4) + shift << 8 * k for k in range(8))
            control = tir.reinterpret(f"int8x{BYTES}", tir.Broadcast(tir.const(offsets, "int64"), BYTES // 8))
            name = "llvm.x86.avx512.pmultishift.qb.512"
            spread = as_words(tir.call_llvm_pure_intrin(f"int8x{BYTES}", name, control, as_bytes(word)))
            if self.ignores_upper_bits and mask == 2**self.section.bits - 1:
                return spread
        else:
            spread = _shifted(word, 16 * half + shift) & splat(0xFFFF, "uint32")
            spread = (spread | spread << splat(8, "uint32")) & splat(0x00FF00FF, "uint32")
            spread = spread | spread << splat(4, "uint32")
        return spread & splat(mask * 0x01010101, "uint32")


class GridBytes(CodeBytes):
    """Unpacks one role's values of a tile, for codebooks that give each code a value on the int8 grid."""

    @property
    def ignores_upper_bits(self) -> bool:
        """Byte permutes look at six bits, in which tables of up to sixteen values repeat themselves."""
        return has_byte_permutes(self.target)

    def table(self) -> None:
        """Nothing: the values are in the code."""

    def unpack_bytes(self, load: LoadWords, _table: None, words: Any, out: Any, first: Expr) -> None:
        """Fill ``out`` from word ``first`` on with 8*head_dim words, the vectors in a row.

        Their bytes are the values on the grid plus ``GRID_OFFSET``.
        """
        values = [int(value) + GRID_OFFSET for value in self.codec.codebook.grid]
        self._deinterleave(load, words)

        def store(number: Expr, codes: Expr) -> None:
            found = look_up_bytes(codes, values, self.target)
            T.buffer_store(out, found, [lanes(first + number * LANES)])

        self.unpack_codes(words, store)


def _word_reader(words: Any, s: int) -> Callable[[Expr], Expr]:
    return lambda number: words[lanes(number * 32 + LANES * s)]


def _shifted(word: Expr, bits: int) -> Expr:
    return word >> splat(bits, "uint32") if bits else word
