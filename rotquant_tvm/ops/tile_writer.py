"""Writing codes and gains into one tile of a cache, leaving the tokens that are there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..formats import KeyLayout, TileLayout
from .axes import Axes
from .tile_access import CodeSection, code_section, gain_position, u32
from .tile_pack import PERIOD, Pieces, WordUpdate, half_word_pieces, tail_pieces, word_pieces

Expr = Any


class TileWriter:
    """Emits the writes of one role's codes and gains into one tile."""

    def __init__(self, cache: Any, tile: tuple[Expr, ...], layout: TileLayout | KeyLayout, role: str) -> None:
        self.cache, self.tile, self.layout = cache, tile, layout
        self.section: CodeSection = code_section(layout, role)
        self.first_gain = layout.sections[f"{role}_gains"].offset // 2

    def store_gain(self, token: Expr, row: Expr, gain: Expr) -> None:
        """Write gain number ``row``, a float16, of a token."""
        half = self.first_gain + row * 32 + gain_position(token)
        shift = (half % 2 * 16).astype("uint32")
        index = [*self.tile, half // 2]
        bits = tir.reinterpret("uint16", gain).astype("uint32") << shift
        T.buffer_store(self.cache, self.cache[tuple(index)] & ~(u32(0xFFFF) << shift) | bits, index)

    def pack(self, axes: Axes, codes: Any, first: Expr, last: Expr, count: Expr) -> None:
        """Write the words of tokens first … last-1 of ``codes`` uint16 [32 * head_dim]; with ``count`` 0, nothing."""
        section, head_dim = self.section, self.section.head_dim
        # A plane's section has its own, smaller head dimension: it is that of the codes which have one more bit.
        for part, shift in ((section, 0), (section.plane, section.bits)):
            if part is not None:
                self._pack(
                    axes,
                    part,
                    lambda token, dim, shift=shift: codes[token * head_dim + dim].astype("uint32") >> u32(shift),
                    (first, last, count),
                )

    def _pack(
        self, axes: Axes, section: CodeSection, code: Callable[..., Expr], tokens: tuple[Expr, Expr, Expr]
    ) -> None:
        first, last, count = tokens

        def written(token: Expr) -> Expr:
            return tir.all(token >= first, token < last)

        update = WordUpdate(section, code, written)

        def store(lane: Expr, word: Expr, pieces: list[Pieces], first_group: Expr) -> None:
            index = [*self.tile, section.word_index(word, lane)]
            update.start()
            update.gather(pieces, first_group, lane)
            T.buffer_store(self.cache, update.result(self.cache[tuple(index)]), index)

        # Inside the lane loops, where no barrier is needed: a block without tokens must not touch its tile.
        some = count > 0
        words, groups = PERIOD[section.bits]
        periods = section.words // words
        if periods:
            with axes.lanes(32 * periods) as index, T.If(some), T.Then():
                lane, period = index % 32, index // 32
                for word in range(words):
                    store(lane, period * words + word, word_pieces(section.bits, word), period * groups)
        pieces = half_word_pieces(section)
        if not pieces:
            return
        if section.bits == 3:
            with axes.lanes(32) as lane, T.If(some), T.Then():
                store(lane, section.words - 1, tail_pieces(2, 2), periods * groups)
        with axes.lanes(16) as pair, T.If(some), T.Then():
            index = [*self.tile, section.half_word_index(pair * 2)[0]]
            update.start()
            for odd in range(2):
                update.gather(pieces, periods * groups, pair * 2 + odd, shift=16 * odd)
            T.buffer_store(self.cache, update.result(self.cache[tuple(index)]), index)
