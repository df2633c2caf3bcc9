"""The packed past on its way to the tensor cores, on CUDA: tiles are copied ahead and unpacked into shared memory.

Keys become float16 rows. Values become operands of the second product right away, since that is the order their codes
are stored in: no transposition, and 16-byte accesses all the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.formats.centre import centre_words

from .cuda_ops import Registers, block_sync, f32, float_of, load_words, pack_half2, prmt, ptx, scalar, store_words, u32
from .mma_half_cuda import FragmentValues
from .packed_half_cuda import HalfFormat, LazyWords, PackedRole, clipped, gain_row, half_pair
from .prefill_tiling_cuda import PrefillTiling
from .row_stream_cuda import commit_copies, copy_ahead, wait_for_copies
from .trellis_half_cuda import store_table

Expr = Any
CENTRE_UNITS = 4
"""Centres are copied in units of 4 bytes, their size being no multiple of more."""


@dataclass(frozen=True)
class PackedPast:
    """Tiles ``begin`` … of a sequence and head, ``tokens`` tokens in all, in stages of ``tiling.tokens``.

    ``centre``: the array of the blocks' mean keys and the tiles of a block, or None.
    """

    tiling: PrefillTiling
    layout: TileLayout
    formats: tuple[HalfFormat, HalfFormat]
    shared: Any
    thread: Expr
    cache: Any
    centre: tuple[Any, int] | None
    where: tuple[Expr, Expr]
    begin: Expr
    tokens: Expr

    @property
    def key_factor(self) -> float:
        """What the scores lack."""
        return self.formats[0].factor

    @property
    def value_octaves(self) -> float:
        """log2 of what the values lack."""
        return log2(self.formats[1].factor)

    @property
    def tiles(self) -> int:
        """Tiles of a stage."""
        return self.tiling.tokens // TOKENS

    @property
    def keys_first(self) -> int:
        """The element of shared memory where the keys' rows begin."""
        return self.tiling.rows * self.tiling.pitch

    @property
    def values_first(self) -> int:
        """The element of shared memory where the values' operands begin."""
        return self.keys_first + self.tiling.role_size

    @property
    def count(self) -> Expr:
        """How many stages there are."""
        size = self.tiling.tokens
        return tir.max(self.tokens - self.begin * TOKENS + (size - 1), 0) // size

    def first_token(self, number: Expr) -> Expr:
        """The first token of a stage, counted behind the sinks."""
        return self.begin * TOKENS + number * self.tiling.tokens

    def table_first(self, role: int) -> int:
        """The element of shared memory where the table of K or V begins."""
        return self.tiling.table_start + (len(self.formats[0].table) if role else 0)

    def start(self) -> None:
        """Begin to copy the first stage."""
        self._copy(tir.const(0, "int32"))
        for role in range(2):
            points = self.formats[role].table
            if points:
                store_table(self.shared, self.table_first(role), points, self.thread, self.tiling.threads)

    def ready(self, number: Expr) -> None:
        """Wait for a stage and unpack it, once all warps have used the one before; start to copy the next."""
        wait_for_copies(0)
        self._unpack(number)
        block_sync()
        self._copy(number + 1)

    def _copy(self, number: Expr) -> None:
        tiling, units = self.tiling, self.layout.tile_bytes // 16
        first = scalar(self.begin + number * self.tiles)
        stored = scalar((self.tokens + (TOKENS - 1)) // TOKENS - first)
        for step in range(-(-self.tiles * units // tiling.threads)):
            unit = self.thread + step * tiling.threads
            with T.If(tir.all(unit < stored * units, unit < self.tiles * units)), T.Then():
                index = [*self.where, first + unit // units, unit % units * 4]
                copy_ahead(self.shared, tiling.raw_start + unit * 8, self.cache, index)
        if self.centre is not None:
            self._copy_centres(first, stored)
        commit_copies()

    def _copy_centres(self, first: Expr, stored: Expr) -> None:
        """The centre of each tile of the stage, behind the tiles."""
        array, tiles = self.centre  # type: ignore[misc]
        words = centre_words(self.tiling.head_dim)
        for step in range(-(-self.tiles * words // self.tiling.threads)):
            unit = self.thread + step * self.tiling.threads
            tile = unit // words
            with T.If(tir.all(tile < self.tiles, tile < stored)), T.Then():
                source = array.ptr_to([*self.where, (first + tile) // tiles, unit % words])
                ptx("cp.async.ca.shared.global", self.shared.ptr_to([self.tiling.centre_start + unit * 2]), source, 4)

    def _unpack(self, number: Expr) -> None:
        """Every warp takes K or V of some tiles, or part of the groups of one."""
        warps = self.tiling.warps
        parts = max(1, warps // (2 * self.tiles))
        side_by_side = warps // (2 * parts)
        warp = self.thread // 32
        unpackers = [TileUnpacker(self, role, self.thread % 32) for role in range(2)]
        with T.serial(0, -(-self.tiles // side_by_side)) as turn:
            tile = scalar(turn * side_by_side + warp // (2 * parts))
            left = scalar(self.tokens - self.first_token(number) - tile * TOKENS)
            with T.If(tile < self.tiles), T.Then():
                for role in range(2):
                    for part in range(parts):
                        with T.If(warp % (2 * parts) == role * parts + part), T.Then():
                            unpackers[role].unpack(tile, left, part, parts)


class TileUnpacker:
    """Writes K or V of one tile as float16 where the products read it; the work of one warp, or of several."""

    def __init__(self, past: PackedPast, role: int, lane: Expr) -> None:
        self.past, self.role, self.lane = past, role, lane
        self.form = past.formats[role]
        self.head_dim = past.tiling.head_dim
        self.blocks = self.head_dim // 16

    def unpack(self, tile: Expr, left: Expr, part: int, parts: int) -> None:
        """Unpack a tile of the stage; ``left`` tokens are stored from its first one on (of V, others become 0)."""
        start = scalar(self.past.tiling.raw_start + tile * (self.past.layout.tile_bytes // 2))
        sections = self.past.layout.sections
        codes, gains, extra = (
            start + sections[f"{'kv'[self.role]}_{name}"].offset // 2 for name in ("codes", "gains", "extra")
        )
        words = LazyWords(self.past.shared, codes, self.lane, self.form.bits, self.head_dim)
        plane = LazyWords(self.past.shared, extra, self.lane, 1, self.head_dim // 2)
        table = self.past.table_first(self.role)
        group = self.form.groups(PackedRole(self.role, words, plane, self.head_dim, self.lane, table))
        groups = self.head_dim // 8
        share = -(-groups // (4 * parts)) * 4
        numbers = range(min(groups, part * share), min(groups, (part + 1) * share))
        if self.role == 0:
            self._keys(tile, group, numbers, gains)
        else:
            self._values(tile, group, numbers, gains, left)

    def _keys(self, tile: Expr, group: Callable[[int], list[Expr]], numbers: range, gains: Expr) -> None:
        """Half p of the groups holds dims 16h + 4t … of token 8i + g, for p = i·d/16 + h."""
        g, t, pitch = self.lane // 4, self.lane % 4, self.past.tiling.pitch
        place = scalar(self.past.keys_first + (tile * TOKENS + g) * pitch + 4 * t)
        gain = self._token_gains(gains)
        centre = self._centre(tile)
        for number in numbers:
            halves = group(number)
            for half in range(2):
                i, h = divmod(2 * number + half, self.blocks)
                values = [self._times(value, gain(h, i)) for value in halves[2 * half : 2 * half + 2]]
                if centre is not None:
                    values = [half_pair("add.rn.f16x2", *pair) for pair in zip(values, centre(h), strict=True)]
                store_words(self.past.shared, [place + (8 * i * pitch + 16 * h)], values, "shared")

    def _values(self, tile: Expr, group: Callable[[int], list[Expr]], numbers: range, gains: Expr, left: Expr) -> None:
        """Group 2j + x holds the operands of tokens 16x … and dims 16j …; word e/2 of a half is two tokens'."""
        fragments = FragmentValues(self.past.shared, self.past.values_first, self.head_dim, self.lane)
        mine = scalar(left - self.lane % 4 * 2)
        stored = Registers(4)
        for i in range(4):
            low = tir.Select(mine > 8 * i, u32(0xFFFF), u32(0))
            stored[i] = low | tir.Select(mine > 8 * i + 1, u32(0xFFFF0000), u32(0))
        gain = self._pair_gains(gains, stored)
        for number in numbers:
            j, x = divmod(number, 2)
            words = group(number)
            if self.form.gains:
                values = [self._times(words[k], gain(j, 2 * x + k % 2)) for k in range(4)]
            else:
                values = [scalar(words[k] & stored[2 * x + k % 2]) for k in range(4)]
            store_words(self.past.shared, [fragments.place(tile * 2 + x, j)], values, "shared")

    def _times(self, value: Expr, gain: Expr | None) -> Expr:
        return value if gain is None else half_pair("mul.rn.f16x2", value, gain)

    def _token_gains(self, start: Expr) -> Callable[[int, int], Expr | None]:
        """``gain(h, i)``: twice the gain of token 8i + g at dims 16h …, None where the format has none."""
        rows, known = self.form.gains, {}
        selector = scalar(tir.Select(self.lane // 4 % 2 == 0, u32(0x1010), u32(0x3232)))

        def gain(h: int, i: int) -> Expr | None:
            row = gain_row(rows, h)
            if not rows:
                return None
            if row not in known:
                words = Registers(4)
                load_words(words, 0, self.past.shared, [start + (32 * row + self.lane // 8 * 8)], 4, "shared")
                known[row] = [prmt(word, word, selector) for word in words]
            return known[row][i]

        return gain

    def _pair_gains(self, start: Expr, stored: Registers) -> Callable[[int, int], Expr]:
        """``gain(j, i)``: those of tokens 8i + 2t and the next at dims 16j …; 0 for what is not stored."""
        rows, known = self.form.gains, {}

        def gain(j: int, i: int) -> Expr:
            row = gain_row(rows, j)
            if row not in known:
                words = Registers(4)
                load_words(words, 0, self.past.shared, [start + (32 * row + self.lane % 4 * 8)], 4, "shared")
                known[row] = [scalar(words[k] & stored[k]) for k in range(4)]
            return known[row][i]

        return gain

    def _centre(self, tile: Expr) -> Callable[[int], list[Expr]] | None:
        """``centre(h)``: dims 16h + 4t … of the mean key, in the units of unpacked keys."""
        if self.past.centre is None:
            return None
        words, known = centre_words(self.head_dim), {}
        start = scalar(self.past.tiling.centre_start + tile * (2 * words))
        scale = Registers(1, "float32")
        load_words(scale, 0, self.past.shared, [start + (2 * words - 2)], 1, "shared")
        scale[0] = scale[0] * f32(1 / self.past.key_factor)

        def centre(h: int) -> list[Expr]:
            if h not in known:
                word = Registers(1)
                load_words(word, 0, self.past.shared, [start + (8 * h + 2 * (self.lane % 4))], 1, "shared")
                bytes_ = scalar(word[0] ^ u32(0x80808080))
                # A byte under the exponent of 2^23 is a float32 of that size, plus the byte.
                floats = [float_of(prmt(bytes_, u32(0x4B000000), u32(0x7650 | e))) for e in range(4)]
                exact = [scalar(clipped((x - f32(2.0**23 + 128)) * scale[0])) for x in floats]
                known[h] = [pack_half2(*exact[:2]), pack_half2(*exact[2:])]
            return known[h]

        return centre
