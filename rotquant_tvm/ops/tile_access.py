"""Symbolic access to the packed tile: where a code or gain of (token, dim) lies, as TensorIR expressions.

The layout is the one that ``rotquant_tvm.formats.packing`` documents and freezes; a tile is read as 32-bit words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir

from ..formats import KeyLayout, KVFormat, TileLayout

Expr = Any
Load = Callable[[Expr], Expr]


def u32(value: Expr) -> Expr:
    """Cast to uint32 (a Python int becomes an immediate)."""
    return tir.const(value, "uint32") if isinstance(value, int) else value.astype("uint32")


def _choose(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """``if_then_else``, folded when the condition is known while the operator is being built."""
    if isinstance(condition, bool):
        return yes if condition else no
    return tir.if_then_else(condition, yes, no)


@dataclass(frozen=True)
class CodeSection:
    """One codes section (K or V) of a tile: ``bits`` wide codes of 32 tokens × ``head_dim``.

    ``first_word`` is the section's offset in the tile in 32-bit words. ``plane`` is the section, with 1-bit codes of
    the first dims, that holds one more bit of theirs.
    """

    role: str
    bits: int
    head_dim: int
    first_word: int
    plane: CodeSection | None = None

    @property
    def groups(self) -> int:
        """Groups of eight codes per lane."""
        return self.head_dim // 8

    @property
    def words(self) -> int:
        """Whole 32-bit words per lane (a half-word may follow)."""
        return self.groups * self.bits // 4

    def element(self, token: Expr, dim: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """(group, half, element, lane) that hold the code of ``token`` (0…31) and ``dim``."""
        if self.role == "k":
            p = token // 8 * (self.head_dim // 16) + dim // 16
            return p // 2, p % 2, dim % 4, token % 8 * 4 + dim % 16 // 4
        return dim // 16 * 2 + token // 16, dim % 16 // 8, token % 16 // 8 * 2 + token % 2, dim % 8 * 4 + token % 8 // 2

    def word_index(self, word: Expr, lane: Expr) -> Expr:
        """Index in the tile of a lane's whole word number ``word``."""
        full = self.words // 4 * 4
        chunk = word // 4 * 128 + lane * 4 + word % 4
        if full < self.words:
            rest = self.words - full
            pair = full * 32 + lane * 2 + (word - full)
            single = (full + rest // 2 * 2) * 32 + lane
            tail = single if rest == 1 else (pair if rest == 2 else _choose(word < full + 2, pair, single))
            chunk = _choose(word < full, chunk, tail)
        return chunk + self.first_word

    def half_word_index(self, lane: Expr) -> tuple[Expr, Expr]:
        """(word index in the tile, shift in bits) of a lane's half-word."""
        return self.words * 32 + lane // 2 + self.first_word, lane % 2 * 16

    def load(self, load: Load, token: Expr, dim: Expr) -> Expr:
        """The code of (``token``, ``dim``) as uint32; ``load(i)`` gives word ``i`` of the tile."""
        low = self._load_low(load, token, dim)
        if self.plane is None:
            return low
        top = self.plane.load(load, token, dim) << u32(self.bits)
        return low | (top if self.plane.head_dim == self.head_dim else _choose(dim < self.plane.head_dim, top, u32(0)))

    def _load_low(self, load: Load, token: Expr, dim: Expr) -> Expr:
        group, half, e, lane = self.element(token, dim)

        def word(number: Expr) -> Expr:
            return load(self.word_index(number, lane))

        nibble = half * 4 + e
        if self.bits == 16:
            return word(group * 4 + half * 2 + e // 2) >> u32(e % 2 * 16) & u32(0xFFFF)
        if self.bits == 8:
            return word(group * 2 + half) >> u32(e * 8) & u32(0xFF)
        if self.bits == 4:
            w = word(group)
            high = w >> u32((e * 2 + 1 - half) * 4 + 3) & u32(1)
            return (w >> u32(nibble * 4) & u32(7)) | high << u32(3)
        if self.bits == 2:
            return word(group // 2) >> u32(nibble * 4 + group % 2 * 2) & u32(3)
        return self._load_planes(load, word, group, nibble, lane)

    def _load_planes(self, load: Load, word: Load, group: Expr, nibble: Expr, lane: Expr) -> Expr:
        """Codes of 1 or 3 bits: both may end in two groups that use a half-word."""
        quads = self.groups // 4 * 4
        index, shift = self.half_word_index(lane)
        half_bit = load(index) >> u32(shift + group % 2 * 8 + nibble) & u32(1)
        if self.bits == 1:
            whole = word(group // 4) >> u32(nibble * 4 + group % 4) & u32(1)
            return whole if quads == self.groups else _choose(group < quads, whole, half_bit)
        first = group // 4 * 3
        direct = word(first + group % 4) >> u32(nibble * 4) & u32(7)
        top = u32(nibble * 4 + 3)
        spread = word(first) >> top & u32(1)
        spread = spread | (word(first + 1) >> top & u32(1)) << u32(1) | (word(first + 2) >> top & u32(1)) << u32(2)
        whole = _choose(group % 4 < 3, direct, spread)
        if quads == self.groups:
            return whole
        low = word(quads // 4 * 3) >> u32(nibble * 4 + group % 2 * 2) & u32(3)
        return _choose(group < quads, whole, low | half_bit << u32(2))


def code_section(layout: TileLayout | KeyLayout, role: str) -> CodeSection:
    """The codes section of ``role`` (``"k"`` or ``"v"``) of a layout."""
    fmt: KVFormat = getattr(layout, role)
    first, extra = (layout.sections[f"{role}_{name}"].offset // 4 for name in ("codes", "extra"))
    dims = fmt.plane_dims(layout.head_dim)
    plane = CodeSection(role, 1, dims, extra) if dims else None
    return CodeSection(role, fmt.bits, layout.head_dim, first, plane)


def gain_position(token: Expr) -> Expr:
    """Position of a token's gain among the 32 gains of its row."""
    return token % 8 // 2 * 8 + token // 8 * 2 + token % 2


def load_gain(layout: TileLayout | KeyLayout, role: str, load: Load, token: Expr, row: Expr) -> Expr:
    """Gain number ``row`` of ``token`` as float32 (formats without gains have none to load)."""
    half = layout.sections[f"{role}_gains"].offset // 2 + row * 32 + gain_position(token)
    bits = load(half // 2) >> u32(half % 2 * 16) & u32(0xFFFF)
    return tir.reinterpret("float16", bits.astype("uint16")).astype("float32")
