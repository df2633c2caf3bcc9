"""Which code bits make up a word of a tile: the writing side of the packed layout, word by word.

A lane's words are written whole, from the codes of 32 tokens, so that no two lanes ever touch the same word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .tile_access import CodeSection, u32

Expr = Any

# bits: (words, groups) after which the packing of a lane's codes repeats.
PERIOD = {1: (1, 4), 2: (1, 2), 3: (3, 4), 4: (1, 1), 8: (2, 1), 16: (4, 1)}


@dataclass(frozen=True)
class Pieces:
    """``width`` bits, from bit ``code_bit``, of those of a group's codes that ``halves`` and ``elements`` tell.

    Both are (first, count). ``place(half, element)`` is the bit of the word where a code's piece stands.
    """

    group: int
    code_bit: int
    width: int
    place: Callable[[Expr, Expr], Expr]
    halves: tuple[int, int] = (0, 2)
    elements: tuple[int, int] = (0, 4)


def _nibbles(group: int, code_bit: int, width: int, bit: int) -> Pieces:
    return Pieces(group, code_bit, width, lambda half, e: half * 16 + e * 4 + bit)


def word_pieces(bits: int, word: int) -> list[Pieces]:
    """What stands in word number ``word`` of a period; groups are counted from the period's first."""
    if bits == 16:
        return [Pieces(0, 0, 16, lambda _, e: e % 2 * 16, (word // 2, 1), (word % 2 * 2, 2))]
    if bits == 8:
        return [Pieces(0, 0, 8, lambda _, e: e * 8, (word, 1))]
    if bits == 4:
        return [_nibbles(0, 0, 3, 0), Pieces(0, 3, 1, lambda half, e: e * 8 + 7 - half * 4)]
    if bits == 3:
        return [_nibbles(word, 0, 3, 0), _nibbles(3, word, 1, 3)]
    return tail_pieces(bits, 4 // bits)


def tail_pieces(width: int, groups: int) -> list[Pieces]:
    """A word of ``groups`` groups whose codes' low ``width`` bits stand side by side in each nibble."""
    return [_nibbles(x, 0, width, width * x) for x in range(groups)]


def _half_word_bits(group: int, code_bit: int) -> Pieces:
    return Pieces(group, code_bit, 1, lambda half, e: half * 4 + e + 8 * group)


def half_word_pieces(section: CodeSection) -> list[Pieces]:
    """What stands in a lane's half-word: nothing unless 1 or 3 bits leave two groups over."""
    if section.bits not in (1, 3) or section.groups % 4 == 0:
        return []
    bit = 0 if section.bits == 1 else 2
    return [_half_word_bits(x, bit) for x in range(2)]


def position(section: CodeSection, group: Expr, half: Expr, element: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """(token, dim) of a lane's code: the inverse of ``CodeSection.element``."""
    g, t = lane // 4, lane % 4
    if section.role == "k":
        p, blocks = group * 2 + half, section.head_dim // 16
        return g + p // blocks * 8, t * 4 + p % blocks * 16 + element
    return t * 2 + group % 2 * 16 + element // 2 * 8 + element % 2, g + group // 2 * 16 + half * 8


class WordUpdate:
    """Emits the read-modify-write of a word: the bits of newly written tokens replace the old ones."""

    def __init__(self, section: CodeSection, code: Callable[..., Expr], written: Callable[[Expr], Expr]) -> None:
        """``code(token, dim)`` is the new code (uint32); ``written(token)`` says whether the token is new."""
        self.section, self.code, self.written = section, code, written
        self.registers = T.sblock_alloc_buffer((2,), "uint32", scope="local")

    def start(self) -> None:
        """Begin a word: no bit replaced."""
        T.buffer_store(self.registers, u32(0), [0])
        T.buffer_store(self.registers, u32(0), [1])

    def gather(self, pieces: list[Pieces], first_group: Expr, lane: Expr, shift: int = 0) -> None:
        """Take in the pieces (groups from ``first_group``) of a lane, ``shift`` bits further up.

        Loops, not unrolled code: the compiler's passes take seconds over the latter.
        """
        for piece in pieces:
            with T.serial(0, piece.halves[1]) as h, T.serial(0, piece.elements[1]) as e:
                half, element = h + piece.halves[0], e + piece.elements[0]
                token, dim = position(self.section, first_group + piece.group, half, element, lane)
                place = u32(piece.place(half, element) + shift)
                hit = tir.Select(self.written(token), u32((1 << piece.width) - 1), u32(0))
                part = (self.code(token, dim) >> u32(piece.code_bit) & hit) << place
                T.buffer_store(self.registers, self.registers[0] | hit << place, [0])
                T.buffer_store(self.registers, self.registers[1] | part, [1])

    def result(self, old: Expr) -> Expr:
        """The word's new content."""
        return old & ~self.registers[0] | self.registers[1]
