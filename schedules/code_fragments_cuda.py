"""Codes of a packed tile as operands of the tensor cores, on CUDA.

A lane's words hold d/8 groups of two halves of four codes (``formats.packing``). A half becomes one register of four
int8 grid values, and that register is an operand of an integer matrix product: the codebook stands in registers as a
table of bytes, a byte permute looks four codes up, and one mask makes the selectors of several halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.formats import Codebook

from .cuda_ops import Registers, load_words, lop3, prmt, u32

Expr = Any
AND_OR = 0xEA
"""Truth table of (a & b) | c."""
CHOOSE = 0xE2
"""Truth table of b ? a : c, bit by bit."""
LOW_BITS = {1: 0x11111111, 2: 0x33333333, 3: 0x77777777}


def words_per_lane(bits: int, head_dim: int) -> int:
    """Registers for a lane's words of a codes section; a half-word at the end takes one of its own."""
    return -(-head_dim * bits // 32)


def load_code_words(words: Registers, shared: Any, start: Expr, lane: Expr, bits: int, head_dim: int) -> None:
    """Load a lane's words of a codes section that begins at word ``start`` of a shared buffer of words."""
    full = head_dim * bits // 32
    quads, done = full // 4, 0
    for quad in range(quads):
        load_words(words, 4 * quad, shared, [start + (128 * quad + 4 * lane)], 4, "shared")
        done += 4
    for count in (2, 1):
        if full - done >= count:
            load_words(words, done, shared, [start + (32 * done + count * lane)], count, "shared")
            done += count
    if head_dim * bits % 32:
        load_words(words, full, shared, [start + (32 * full + lane // 2)], 1, "shared")
        words[full] = words[full] >> u32((lane % 2) * 16)


def fine_grid(book: Codebook) -> tuple[NDArray[np.int8], float]:
    """The codebook's grid, as fine as int8 allows (sums of small integers would be rounded coarsely), and its scale."""
    factor = 127 // int(np.abs(book.grid.astype(np.int32)).max())
    return book.grid * np.int8(factor), float(book.scale) / factor


def byte_table(values: NDArray[np.int8]) -> list[Expr]:
    """Values of codes as words of four bytes, in the order of the codes."""
    padded = np.resize(values.view(np.uint8), max(4, values.size))
    return [u32(int(word)) for word in np.ascontiguousarray(padded).view("<u4")]


class CodeFragments:
    """Looks up the halves of a lane's groups; every group's instructions are emitted once, when first needed."""

    def __init__(self, words: Registers, book: Codebook, head_dim: int) -> None:
        self._start(words, fine_grid(book)[0], head_dim)

    @classmethod
    def of_values(cls, words: Registers, values: NDArray[np.int8], head_dim: int) -> CodeFragments:
        """Look up other values of the codes: int8 [2^bits]."""
        fragments = cls.__new__(cls)
        fragments._start(words, values, head_dim)
        return fragments

    def _start(self, words: Registers, values: NDArray[np.int8], head_dim: int) -> None:
        self.words, self.bits, self.groups = words, values.size.bit_length() - 1, head_dim // 8
        self._table = byte_table(values)
        self._known: dict[int, tuple[Expr, Expr]] = {}

    def half(self, number: int) -> Expr:
        """The four values (int8, one register) of half ``number % 2`` of group ``number // 2``."""
        group = number // 2
        if group not in self._known:
            self._known[group] = self._four_bits(group) if self.bits == 4 else self._few_bits(group)
        return self._known[group][number % 2]

    def _few_bits(self, group: int) -> tuple[Expr, Expr]:
        """Up to 3 bits: the nibbles of one word are the selectors of both halves."""
        selectors = Registers(1)
        selectors[0] = self._selectors(group)
        low, high = self._table[0], self._table[-1]
        return prmt(low, high, selectors[0]), prmt(low, high, selectors[0] >> u32(16))

    def _selectors(self, group: int) -> Expr:
        word, bits = self.words, self.bits
        if bits == 2:
            return word[group >> 1] >> u32(2 * (group & 1)) & u32(LOW_BITS[2])
        if bits == 1:
            if group >> 2 == self.groups // 4:
                return _spread(word[group >> 2] >> u32(8 * (group & 1)))
            return word[group >> 2] >> u32(group & 3) & u32(LOW_BITS[1])
        quad, place = group >> 2, group & 3
        if quad == self.groups // 4:
            top = _spread(word[3 * quad + 1] >> u32(8 * (group & 1))) << u32(2)
            return lop3(word[3 * quad] >> u32(2 * (group & 1)), u32(LOW_BITS[2]), top, AND_OR)
        if place < 3:
            return word[3 * quad + place] & u32(LOW_BITS[3])
        # The fourth group: bit b of its codes is the spare bit of the nibbles of word b.
        lowest = word[3 * quad] >> u32(3) & u32(0x11111111)
        middle = lop3(word[3 * quad + 1] >> u32(2), u32(0x22222222), lowest, AND_OR)
        return lop3(word[3 * quad + 2] >> u32(1), u32(0x44444444), middle, AND_OR)

    def _four_bits(self, group: int) -> tuple[Expr, Expr]:
        """Sixteen values are two tables of eight; bit 3 of the codes stands where bytes' signs make the masks."""
        word, table = self.words[group], self._table
        selectors = Registers(1)
        selectors[0] = word & u32(LOW_BITS[3])
        halves = []
        for half in range(2):
            mask = prmt(word if half == 0 else word << u32(4), word, u32(0xBA98))
            chosen = selectors[0] if half == 0 else selectors[0] >> u32(16)
            halves.append(lop3(prmt(table[2], table[3], chosen), mask, prmt(table[0], table[1], chosen), CHOOSE))
        return halves[0], halves[1]


def _spread(byte: Expr) -> Expr:
    """Bits 0 … 7 of a word as bit 0 of nibbles 0 … 7."""
    cell = Registers(1)
    cell[0] = byte & u32(0xFF)
    for shift, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        cell[0] = (cell[0] | cell[0] << u32(shift)) & u32(mask)
    return cell[0]
