"""Unpacking packed tiles into float16 in shared memory, on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import HALF_MAX, TOKENS
from rotquant_tvm.formats.centre import centre_words

from .cuda_ops import WARP, Registers, f32, half2, load_words, pack_half2, prmt, scalar, u32
from .packed_half_cuda import LazyWords, PackedRole, gain_row, half_pair
from .packed_tiles_cuda import PackedTiles

Expr = Any


class UnpackedPlace(Protocol):
    """Where unpacked tiles go: the matrices that the products read."""

    def store_keys(self, tile: Expr, eight: int, sixteen: int, values: list[Expr]) -> None:
        """Store dims 16·sixteen + 4t … + 3 of token 8·eight + g of a tile, two words."""

    def store_gain(self, tile: Expr, token: Expr, gain: Expr) -> None:
        """Store what the scores of a tile's token are to be multiplied by (``PackedTiles.late_gains``), float32."""

    def store_values(self, tile: Expr, sixteen: int, tokens: int, values: list[Expr]) -> None:
        """Store dims 16·sixteen + g and + 8 of tokens 16·tokens + 2t, + 1, + 8, + 9 of a tile.

        The words: two pairs of tokens of the first dim, then of the second.
        """


class TileUnpacker:
    """Writes K or V of one tile as float16 where the products read it; the work of one warp, or of several."""

    def __init__(self, raw: PackedTiles, place: UnpackedPlace, role: int, lane: Expr) -> None:
        self.raw, self.place, self.role, self.lane = raw, place, role, lane
        self.form = raw.formats[role]
        self.head_dim = raw.head_dim
        self.blocks = self.head_dim // 16

    def unpack(self, tile: Expr, left: Expr, part: int, parts: int) -> None:
        """Unpack a tile of the stage; ``left`` tokens are stored from its first one on (of V, others become 0)."""
        start = scalar(self.raw.raw_start + tile * (self.raw.segments.layout.tile_bytes // 2))
        sections = self.raw.segments.layout.sections
        codes, gains, extra = (
            start + sections[f"{'kv'[self.role]}_{name}"].offset // 2 for name in ("codes", "gains", "extra")
        )
        words = LazyWords(self.raw.shared, codes, self.lane, self.form.bits, self.head_dim)
        plane = LazyWords(self.raw.shared, extra, self.lane, 1, self.head_dim // 2)
        table = self.raw.table(self.role)
        group = self.form.groups(PackedRole(self.role, words, plane, self.head_dim, self.lane, table))
        groups = self.head_dim // 8
        share = -(-groups // (4 * parts)) * 4
        numbers = range(min(groups, part * share), min(groups, (part + 1) * share))
        if self.role == 0:
            if self.raw.late_gains and part == 0:
                # Token 8i + g, g = 2h + u, is element 8h + 2i + u.
                at = gains + self.lane % 8 // 2 * 8 + self.lane // 8 * 2 + self.lane % 2
                self.place.store_gain(tile, self.lane, self.raw.shared[at].astype("float32"))
            self._keys(tile, group, numbers, gains)
        else:
            self._values(tile, group, numbers, gains, left)

    def _keys(self, tile: Expr, group: Callable[[int], list[Expr]], numbers: range, gains: Expr) -> None:
        """Half p of the groups holds dims 16h + 4t … of token 8i + g, for p = i·d/16 + h."""
        gain = (lambda h, i: None) if self.raw.late_gains else self._token_gains(gains)
        centre = self._centre(tile)
        for number in numbers:
            halves = group(number)
            for half in range(2):
                i, h = divmod(2 * number + half, self.blocks)
                pairs, times = halves[2 * half : 2 * half + 2], gain(h, i)
                if centre is None:
                    values = [self._times(pair, times) for pair in pairs]
                elif times is None:
                    values = [half_pair("add.rn.f16x2", *each) for each in zip(pairs, centre(h), strict=True)]
                else:
                    both = zip(pairs, centre(h), strict=True)
                    values = [half_pair("fma.rn.f16x2", pair, times, mean) for pair, mean in both]
                self.place.store_keys(tile, i, h, values)

    def _values(self, tile: Expr, group: Callable[[int], list[Expr]], numbers: range, gains: Expr, left: Expr) -> None:
        """Group 2j + x holds the operands of tokens 16x … and dims 16j …; word e/2 of a half is two tokens'."""
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
            self.place.store_values(tile, j, x, values)

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
                load_words(words, 0, self.raw.shared, [start + (32 * row + self.lane // 8 * 8)], 4, "shared")
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
                load_words(words, 0, self.raw.shared, [start + (32 * row + self.lane % 4 * 8)], 4, "shared")
                known[row] = [scalar(words[k] & stored[k]) for k in range(4)]
            return known[row][i]

        return gain

    def _centre(self, tile: Expr) -> Callable[[int], list[Expr]] | None:
        """``centre(h)``: dims 16h + 4t … of the mean key, in the units of unpacked keys.

        The scale is the sum of two float16: rounded to one, it would be wrong by as much for all dims, and a score by
        more than all roundings of single elements move it.
        """
        if not self.raw.centred:
            return None
        words, known = centre_words(self.head_dim), {}
        start = scalar(self.raw.centre_start + tile * (2 * words))
        scale = Registers(1, "float32")
        load_words(scale, 0, self.raw.shared, [start + (2 * words - 2)], 1, "shared")
        most = f32(HALF_MAX / 128)
        scale[0] = tir.max(tir.min(scale[0] * f32(1 / self.raw.key_factor), most), f32(0) - most)
        rounded = pack_half2(scale[0], scale[0])
        rest = scalar(scale[0] - half2(rounded)[0])
        remainder = pack_half2(rest, rest)

        def centre(h: int) -> list[Expr]:
            if h not in known:
                word = Registers(1)
                load_words(word, 0, self.raw.shared, [start + (8 * h + 2 * (self.lane % 4))], 1, "shared")
                bytes_ = scalar(word[0] ^ u32(0x80808080))
                # A byte under the exponent of 1024 is a float16 of that size, plus the byte.
                raised = [prmt(bytes_, u32(0x64646464), u32(order)) for order in (0x4140, 0x4342)]
                exact = [half_pair("sub.rn.f16x2", pair, u32(0x64806480)) for pair in raised]
                large = [half_pair("mul.rn.f16x2", pair, rounded) for pair in exact]
                both = zip(exact, large, strict=True)
                known[h] = [half_pair("fma.rn.f16x2", pair, remainder, product) for pair, product in both]
            return known[h]

        return centre


def unpack_roles(
    roles: tuple[int, ...], raw: PackedTiles, place: UnpackedPlace, stored: Expr, thread: Expr, warps: int
) -> None:
    """Unpack K, V or both of the tiles at hand, by so many warps, each a role of a tile or part of it.

    ``stored`` tokens are there from the first tile's first on.
    """
    parts = max(1, warps // (len(roles) * raw.tiles))
    shares = len(roles) * parts
    at_once = warps // shares
    warp = scalar(thread // WARP)
    with T.serial(0, -(-raw.tiles // at_once)) as turn:
        tile = scalar(turn * at_once + warp // shares)
        left = scalar(stored - tile * TOKENS)
        with T.If(tile < raw.tiles), T.Then():
            for number, role in enumerate(roles):
                unpacker = TileUnpacker(raw, place, role, thread % WARP)
                for part in range(parts):
                    with T.If(warp % shares == number * parts + part), T.Then():
                        unpacker.unpack(tile, left, part, parts)
