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


@dataclass(frozen=True)
class Piece:
    """``width`` bits of one code, from bit ``code_bit``, standing at bit ``word_bit`` of a word."""

    group: int
    half: int
    element: int
    code_bit: int
    width: int
    word_bit: int


def _each() -> list[tuple[int, int]]:
    return [(half, e) for half in range(2) for e in range(4)]


# bits: (words, groups) after which the packing of a lane's codes repeats.
PERIOD = {1: (1, 4), 2: (1, 2), 3: (3, 4), 4: (1, 1), 8: (2, 1), 16: (4, 1)}


def word_pieces(bits: int, word: int) -> list[Piece]:
    """The pieces of word number ``word`` of a period, groups counted from the period's first."""
    if bits == 16:
        return [Piece(0, word // 2, word % 2 * 2 + u, 0, 16, 16 * u) for u in range(2)]
    if bits == 8:
        return [Piece(0, word, e, 0, 8, 8 * e) for e in range(4)]
    if bits == 4:
        low = [Piece(0, half, e, 0, 3, 4 * (4 * half + e)) for half, e in _each()]
        return low + [Piece(0, half, e, 3, 1, 4 * (2 * e + 1 - half) + 3) for half, e in _each()]
    if bits == 3:
        low = [Piece(word, half, e, 0, 3, 4 * (4 * half + e)) for half, e in _each()]
        return low + [Piece(3, half, e, word, 1, 4 * (4 * half + e) + 3) for half, e in _each()]
    return tail_pieces(bits, 4 // bits)


def tail_pieces(width: int, groups: int) -> list[Piece]:
    """A word of ``groups`` groups whose codes' low ``width`` bits stand side by side in each nibble."""
    return [
        Piece(x, half, e, 0, width, 4 * (4 * half + e) + width * x) for x in range(groups) for half, e in _each()
    ]


def half_word_pieces(section: CodeSection) -> list[Piece]:
    """The pieces of a lane's half-word: none unless 1 or 3 bits leave two groups over."""
    if section.bits not in (1, 3) or section.groups % 4 == 0:
        return []
    bit = 0 if section.bits == 1 else 2
    return [Piece(x, half, e, bit, 1, 8 * x + 4 * half + e) for x in range(2) for half, e in _each()]


def position(section: CodeSection, piece: Piece, first_group: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """(token, dim) of a piece for a lane: the inverse of ``CodeSection.element``."""
    g, t = lane // 4, lane % 4
    group = first_group + piece.group
    if section.role == "k":
        p, blocks = group * 2 + piece.half, section.head_dim // 16
        return g + p // blocks * 8, t * 4 + p % blocks * 16 + piece.element
    token = t * 2 + group % 2 * 16 + (8 * (piece.element // 2) + piece.element % 2)
    return token, g + group // 2 * 16 + 8 * piece.half


class WordUpdate:
    """Emits the read-modify-write of a word: the bits of newly written tokens replace the old ones.

    Mask and value are gathered in two registers, since one expression over all pieces takes the simplifier seconds.
    """

    def __init__(self, section: CodeSection, code: Callable[..., Expr], written: Callable[[Expr], Expr]) -> None:
        """``code(token, dim)`` is the new code (uint32); ``written(token)`` says whether the token is new."""
        self.section, self.code, self.written = section, code, written
        self.registers = T.sblock_alloc_buffer((2,), "uint32", scope="local")

    def start(self) -> None:
        """Begin a word."""
        T.buffer_store(self.registers, u32(0), [0])
        T.buffer_store(self.registers, u32(0), [1])

    def gather(self, pieces: list[Piece], first_group: Expr, lane: Expr, shift: int = 0) -> None:
        """Take in the pieces (groups from ``first_group``) of a lane, ``shift`` bits further up."""
        for piece in pieces:
            token, dim = position(self.section, piece, first_group, lane)
            place = u32(piece.word_bit + shift)
            hit = tir.Select(self.written(token), u32((1 << piece.width) - 1), u32(0))
            part = (self.code(token, dim) >> u32(piece.code_bit) & hit) << place
            T.buffer_store(self.registers, self.registers[0] | hit << place, [0])
            T.buffer_store(self.registers, self.registers[1] | part, [1])

    def result(self, old: Expr) -> Expr:
        """The word's new content."""
        return old & ~self.registers[0] | self.registers[1]
