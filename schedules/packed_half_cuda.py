"""Codes of a packed tile as float16, on CUDA: what the formats (``half_formats_cuda``) have in common.

A lane's groups of eight come in the order in which it holds them. What comes out is a value's grid point over 128, so
that it stays within the gain's own size; the factor that is missing, one for all elements of K or V, belongs to the
softmax scale or to the weights. These float16 are exact: a gain's product with them is what is rounded, where there is
one (``PackedTiles.late_gains``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from numpy.typing import NDArray

from rotquant_tvm.formats import HALF_MAX
from rotquant_tvm.formats.linear import LINEAR_BLOCK

from .code_fragments_cuda import CodeFragments
from .cuda_ops import Registers, f32, load_words, prmt, ptx, u32

Expr = Any
GRID = 128.0
"""Grid points are −128 … 127, over this."""
NINE = 0xC880C880
"""Twice the float16 −9: a byte under the exponent byte 0x48 reads 8 + byte/128, and bytes are grid points + 128."""


def half_pair(name: str, *operands: Expr) -> Expr:
    """An instruction on pairs of float16, such as ``"add.rn.f16x2"``."""
    cell = Registers(1)
    ptx(name, cell[0], *operands)
    return cell[0]


class LazyWords:
    """A lane's words of a section that is laid out like codes (``formats.packing``), loaded when first asked for."""

    def __init__(self, shared: Any, start: Expr, lane: Expr, bits: int, head_dim: int) -> None:
        """``start``: the element of ``shared``, of 16 bits, where the section begins."""
        self.shared, self.start, self.lane = shared, start, lane
        self.full, self.half_word = head_dim * bits // 32, bool(head_dim * bits % 32)
        self._known: dict[int, Expr] = {}

    def __getitem__(self, number: int) -> Expr:
        """Word ``number`` (uint32); a half-word at the end in its low bits."""
        if number not in self._known:
            self._load(number)
        return self._known[number]

    def _load(self, number: int) -> None:
        full, quads = self.full, self.full // 4 * 4
        if number == full:
            half = Registers(1)
            load_words(half, 0, self.shared, [self.start + (64 * full + self.lane // 2 * 2)], 1, "shared")
            half[0] = half[0] >> u32(self.lane % 2 * 16)
            self._known[number] = half[0]
            return
        pairs = quads + (full - quads) // 2 * 2
        first, count = (number // 4 * 4, 4) if number < quads else (quads, 2) if number < pairs else (pairs, 1)
        words = Registers(count)
        load_words(words, 0, self.shared, [self.start + (64 * first + 2 * count * self.lane)], count, "shared")
        self._known |= {first + k: words[k] for k in range(count)}


def grid_points(grid: NDArray[Any]) -> list[int]:
    """A codebook's grid as Python numbers."""
    return [int(point) for point in grid]


def byte_table(points: Sequence[int]) -> list[Expr]:
    """Grid points + 128 as words of four bytes, in the order of the codes."""
    padded = np.resize((np.array(points) + 128).astype(np.uint8), max(4, len(points)))
    return [u32(int(word)) for word in padded.view("<u4")]


class ByteFragments(CodeFragments):
    """Looks codes of up to 4 bits up in a table of grid points + 128."""

    def __init__(self, words: LazyWords, points: Sequence[int], head_dim: int) -> None:
        self.words, self.bits, self.groups = words, len(points).bit_length() - 1, head_dim // 8
        self._table = byte_table(points)
        self._known: dict[int, tuple[Expr, Expr]] = {}


Group = Callable[[int], list[Expr]]
"""A group's eight values, two to a word, half after half; to be asked for once."""


@dataclass(frozen=True)
class PackedRole:
    """What a warp reads of K or V of one tile: its words of the codes and of the plane of further bits.

    ``table``: the element of shared memory where the format's table begins, if it has one.
    """

    role: int
    words: LazyWords
    plane: LazyWords
    head_dim: int
    lane: Expr
    table: Expr


@dataclass(frozen=True)
class HalfFormat:
    """How a format's codes become float16: value = half · gain · ``factor``.

    ``gains``: how many a vector has. ``table``: grid points that ``groups`` looks up in shared memory (over ``GRID``).
    """

    bits: int
    factor: float
    gains: int
    groups: Callable[[PackedRole], Group]
    table: tuple[int, ...] = ()


def expand_bytes(word: Expr) -> list[Expr]:
    """Four grid points + 128 as float16 grid points over 128, two words of two."""
    return [half_pair("add.rn.f16x2", prmt(word, u32(0x48484848), u32(s)), u32(NINE)) for s in (0x4140, 0x4342)]


def clipped(value: Expr) -> Expr:
    """A float32 that a float16 can hold."""
    return tir.max(tir.min(value, f32(HALF_MAX)), f32(-HALF_MAX))


def gain_row(gains: int, sixteen: int) -> int:
    """Which of a vector's gains belongs to the sixteen dims of a number."""
    return 16 * sixteen // LINEAR_BLOCK if gains > 1 else 0


class Nibbles(ByteFragments):
    """The codes themselves, of up to 3 bits."""

    def __init__(self, words: LazyWords, bits: int, head_dim: int) -> None:
        super().__init__(words, range(2**bits), head_dim)
        self._words: dict[int, Expr] = {}

    def group(self, number: int) -> Expr:
        """A group's eight codes in the nibbles of a word."""
        if number not in self._words:
            cell = Registers(1)
            cell[0] = self._selectors(number)
            self._words[number] = cell[0]
        return self._words[number]


def spread_nibbles(word: Expr) -> Expr:
    """The four low nibbles of a word as bytes."""
    cell = Registers(1)
    cell[0] = word & u32(0xFFFF)
    cell[0] = (cell[0] | cell[0] << u32(8)) & u32(0x00FF00FF)
    cell[0] = (cell[0] | cell[0] << u32(4)) & u32(0x0F0F0F0F)
    return cell[0]
