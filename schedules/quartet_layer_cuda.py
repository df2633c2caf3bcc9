"""The last layer of a Hurwitz rotation on accumulators, on CUDA: eight additions to four elements, no signs.

The layer multiplies quartets (x_0, …, x_3), whose dims are d/4 apart, by quaternions (±1 ±i ±j ±k)/2. With r the first
row of such a matrix, ε = -16·r_0·r_1·r_2·r_3 and z = (ε·r_0·x_0, -ε·r_1·x_1, -r_2·x_2, -r_3·x_3), let

    c_0 = (z_0 - z_1) - (z_2 + z_3)    c_1 = (z_0 + z_1) - (z_2 - z_3)
    c_2 = (z_0 + z_1) + (z_2 - z_3)    c_3 = (z_0 - z_1) + (z_2 + z_3)

Then the outputs are, with o_p = -4ε·r_0·r_p, (c_0, o_1·c_1, o_2·c_2, o_3·c_3) if ε = 1 and
(-c_3, o_1·c_1, o_2·c_0, o_3·c_2) if ε = -1. The factors of x go into the matrix of the layers before. Codebooks are
antisymmetric: a code of -c is the complement of c's, so that signs and order are put right in the words of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir

from rotquant_tvm.formats import Codec
from rotquant_tvm.formats.quaternion import left_matrix

from .cuda_ops import WARP, Registers, f32, i32, load_words, lop3, scalar, store_words, u32
from .tile_lane_cuda import Lane
from .tile_pack_cuda import SELECT

Expr = Any
FLIP = 0x78
"""Truth table of a ^ (b & c)."""


class QuartetLayer:
    """Emits it for one role."""

    def __init__(self, codec: Codec, role: str) -> None:
        """Plan it, emitting nothing; ``possible(codec)`` has said yes."""
        layers = codec.rotation.structure
        self.role, self.stride = role, layers[-1][1]
        self.offset = codec.head_dim * sum(block for block, _ in layers[:-1])
        self.ones = (1 << codec.format.bits) - 1
        self.words = (4 if role == "k" else 8) * WARP
        """32-bit words of shared memory."""

    @staticmethod
    def possible(codec: Codec) -> bool:
        """Whether the rotation ends in such a layer, after others within 16 dims.

        Its stride must keep the elements of a quartet in different words of codes, at the same place there.
        """
        *before, last = codec.rotation.layers or [None]
        if not before or last.block != 4 or last.stride % 32 or 4 * last.stride != codec.head_dim:
            return False
        if any(16 % (layer.block * layer.stride) for layer in before):
            return False
        rows = last.coefficients[: last.stride]
        expected = left_matrix(rows * (1, -1, -1, -1)).swapaxes(0, 1).reshape(-1, 4)
        return bool((np.abs(rows) == 0.5).all() and (expected == last.coefficients).all())

    def fetch(self, coefficients: Any, dim: Expr) -> Registers:
        """Load the first row of the matrix of a quartet that ``dim`` is in."""
        row = Registers(4, "float32")
        load_words(row, 0, coefficients, [dim % self.stride * 4 + self.offset], 4, "global.nc")
        return row

    def factor(self, row: Registers, dim: Expr) -> Expr:
        """What x is multiplied by, and by 1/2, at ``dim``."""
        odd = scalar(row[0] * row[1] * (row[2] * row[3]) * f32(16))
        place = scalar(dim // self.stride)
        early = tir.Select(place == 0, f32(0) - odd * row[0], odd * row[1])
        late = f32(0) - tir.Select(place == 2, row[2], row[3])
        return scalar(tir.Select(place < 2, early, late))

    # Words of codes

    def fetch_quartets(self, coefficients: Any, lane: Expr) -> list[Registers]:
        """Load what ``store`` needs, by a warp."""
        g, t = lane // 4, lane % 4
        if self.role == "k":
            dims = [16 * half + 4 * t + e for half in range(2) for e in range(4)]
        else:
            dims = [16 * parity + 8 * half + g for parity in range(2) for half in range(2)]
        return [self.fetch(coefficients, scalar(i32(dim))) for dim in dims]

    def store(self, rows: Sequence[Registers], shared: Any, first: int, lane: Expr) -> None:
        """Store the lane's masks, from half ``first`` of ``shared`` (uint16): where ε = -1, then where o_p = -1."""
        self.shared, self.first = shared, first
        each = 1 if self.role == "k" else 4
        for part in range(len(rows) * each // 8):
            masks = [u32(0)] * 4
            for n, row in enumerate(rows[part * 8 // each : (part + 1) * 8 // each]):
                ones = u32(sum(self.ones << 4 * (n * each + e) for e in range(each)))
                odd = row[0] * row[1] * (row[2] * row[3])
                signs = [odd, *(row[0] * row[p] * odd for p in (1, 2, 3))]
                # odd has the sign of -ε, a product with it that of o_p.
                tests = [signs[0] > f32(0), *(sign < f32(0) for sign in signs[1:])]
                masks = [scalar(m | tir.Select(test, ones, u32(0))) for m, test in zip(masks, tests, strict=True)]
            store_words(shared, [first + part * (8 * WARP) + lane * 8], masks, "shared")

    def combine(self, pairs: Sequence[tuple[Registers, Registers]]) -> list[Registers]:
        """c_0 … c_3, from z_0 + z_1 and z_0 - z_1, and the same of z_2 and z_3."""
        (high, low), (both, apart) = pairs
        for index in range(high.count):
            total = scalar(low[index] + both[index])
            low[index] = low[index] - both[index]
            both[index] = total
            total = scalar(high[index] + apart[index])
            high[index] = high[index] - apart[index]
            apart[index] = total
        return [low, high, apart, both]

    def arrange(self, groups: Sequence[Expr], some: Sequence[Expr], order: Lane) -> list[Expr]:
        """The groups of half a tile from those of c.

        ``some``: ones at the codes of vectors other than zero; a word for each r of keys' tokens, or one for values.
        """
        parts = 1 if self.role == "k" else 2
        found = list(groups)
        for part in range(parts):
            masks = Registers(4)
            load_words(masks, 0, self.shared, [self.first + part * (8 * WARP) + order.lane * 8], 4, "shared")
            # Words of a quartet: four in a row of one r, or the values' at even or odd places.
            for quartet, ones in enumerate(some):
                places = [quartet * 4 + p if self.role == "k" else 2 * p + part for p in range(4)]
                c = [groups[place] for place in places]
                moved = [lop3(masks[0], a, b, SELECT) for a, b in ((c[3], c[0]), (c[0], c[2]), (c[2], c[3]))]
                words = [moved[0], c[1], moved[1], moved[2]]
                for p, place in enumerate(places):
                    found[place] = lop3(words[p], masks[p], ones, FLIP)
        return found

    def some(self, squares: Sequence[Expr]) -> list[Expr]:
        """``some`` of ``arrange``, from the squared norms of the lane's tokens."""
        flags = [square > f32(0) for square in squares]
        if self.role == "k":
            return [scalar(tir.Select(flag, u32(0xFFFFFFFF), u32(0))) for flag in flags]
        parts = [tir.Select(flag, u32(0x000F000F << 4 * slot), u32(0)) for slot, flag in enumerate(flags)]
        return [scalar(parts[0] | parts[1] | (parts[2] | parts[3]))]
