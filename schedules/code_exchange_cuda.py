"""Codes, a byte each, that lanes exchange as ``exchanged_rotation_cuda`` exchanges elements, on CUDA.

A word has the codes of four registers. A swap of bit j of the register's number and bit k of the lane's is an exchange
of the codes with bit j set with the lane across bit k; before it, lanes with bit k set hold theirs in the other order.
Where bit j is one of the byte's number, that order is one of byte selectors: two words take four instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir

from .cuda_ops import prmt, scalar, shuffle_xor, u32
from .exchanged_rotation_cuda import ExchangedRotation

Expr = Any
Pair = tuple[Expr, Expr]
_BYTE_BITS = 2
_UPPER = {0: 0x7531, 1: 0x7632}
"""The bytes of two words with a bit of their number set, by the bit."""
_LOWER = {0: 0x6420, 1: 0x5410}
_INSERT = {0: (0x5240, 0x7260), 1: (0x5410, 0x7610)}
"""A word's bytes with the bit clear, and in the places of those with it set the first or last two of another word."""
_INSERT_AFTER_UPPER = {0: (0x5341, 0x7361), 1: (0x5432, 0x7632)}
"""The word's bytes with the bit set instead, in the same places."""
_INSERT_BEFORE = {0: (0x2504, 0x2706), 1: (0x1054, 0x1076)}
"""As ``_INSERT``, with the two kinds of places swapped."""


class CodeExchange:
    """The way of codes from the layout of vectors as they are read to the one of rotated vectors, and back."""

    def __init__(self, rotation: ExchangedRotation, lane: Expr) -> None:
        """Emit what is the same for all vectors; ``lane`` is the thread's number in its vector."""
        swaps = [swap for layer in rotation.layers for swap in layer.exchanges]
        self._swaps = [_Swap(own, 1 << other, scalar((lane >> other & 1) == 1, "bool")) for own, other in swaps]

    def into(self, words: Sequence[Expr]) -> list[Expr]:
        """The words of rotated vectors' codes, of those that were read."""
        words = list(words)
        for swap in self._swaps:
            for low, high in swap.pairs(len(words)):
                words[low], words[high] = swap.into(words[low], words[high])
        return words

    def back(self, words: Sequence[Expr]) -> list[Expr]:
        """The words of codes as they are written, of those of rotated vectors."""
        words = list(words)
        for swap in reversed(self._swaps):
            for low, high in swap.pairs(len(words)):
                words[low], words[high] = swap.back(words[low], words[high])
        return words


@dataclass(frozen=True)
class _Swap:
    """One swap: the register's bit, the lanes' distance, and whether the lane's bit is set."""

    own: int
    distance: int
    odd: Expr

    def pairs(self, count: int) -> list[tuple[int, int]]:
        """The words that are worked on together: those that differ by the bit, or any two if it is the byte's."""
        bit = 1 << max(0, self.own - _BYTE_BITS)
        return [(k, k | bit) for k in range(count) if not k & bit]

    def _select(self, even: int, odd: int) -> Expr:
        return tir.Select(self.odd, u32(odd), u32(even))

    def into(self, low: Expr, high: Expr) -> Pair:
        """Take the lane's order, then exchange."""
        if self.own >= _BYTE_BITS:
            sent = scalar(tir.Select(self.odd, low, high))
            return scalar(tir.Select(self.odd, high, low)), shuffle_xor(sent, self.distance)
        sent = prmt(low, high, self._select(_UPPER[self.own], _LOWER[self.own]))
        return self._insert((low, high), shuffle_xor(sent, self.distance), _INSERT_AFTER_UPPER)

    def back(self, low: Expr, high: Expr) -> Pair:
        """Exchange, then leave the lane's order."""
        if self.own >= _BYTE_BITS:
            received = shuffle_xor(high, self.distance)
            return scalar(tir.Select(self.odd, received, low)), scalar(tir.Select(self.odd, low, received))
        sent = prmt(low, high, u32(_UPPER[self.own]))
        return self._insert((low, high), shuffle_xor(sent, self.distance), _INSERT_BEFORE)

    def _insert(self, words: Pair, received: Expr, odd: dict[int, tuple[int, int]]) -> Pair:
        even = _INSERT[self.own]
        picked = [prmt(word, received, self._select(even[k], odd[self.own][k])) for k, word in enumerate(words)]
        return picked[0], picked[1]
