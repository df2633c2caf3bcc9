"""Codes of a split codebook as float16, on CUDA: half of the channels have one more bit, in a plane of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from rotquant_tvm.formats import SplitCodebook

from .code_fragments_cuda import CHOOSE
from .cuda_ops import lop3, prmt, scalar, u32
from .packed_half_cuda import (
    Group,
    Nibbles,
    PackedRole,
    byte_table,
    expand_bytes,
    grid_points,
    half_pair,
    spread_nibbles,
)

Expr = Any


def split_groups(book: SplitCodebook, tile: PackedRole) -> Group:
    """The groups of one tile, in the units of the wide half's grid."""
    blocks = tile.head_dim // 16
    codes = Nibbles(tile.words, book.bits, tile.head_dim)
    tops = Nibbles(tile.plane, 1, tile.head_dim // 2)
    wide, narrow = (byte_table(grid_points(half.grid)) for half in (book.wide, book.narrow))
    share = np.float16(float(book.narrow.scale) / float(book.wide.scale)).view(np.uint16)
    ratio = u32(int(share) * 0x10001)

    def group(number: int) -> list[Expr]:
        values = []
        for half in range(2):
            low = scalar(codes.group(number) >> u32(16 * half) & u32(0xFFFF))
            place = _place_in_plane(tile.role, number, half, blocks)
            if place is None:
                table = prmt(narrow[0], narrow[-1], low)
                values += [half_pair("mul.rn.f16x2", pair, ratio) for pair in expand_bytes(table)]
                continue
            top = scalar(tops.group(place // 2) >> u32(16 * (place % 2)))
            values += expand_bytes(_look_up(wide, book.bits, low, top))
        return values

    return group


def _place_in_plane(role: int, group: int, half: int, blocks: int) -> int | None:
    """Which half of the plane's groups has the top bits of a half of codes; None where there are none."""
    if role == 0:
        i, h = divmod(2 * group + half, blocks)
        return i * (blocks // 2) + h if h < blocks // 2 else None
    return 2 * group + half if group // 2 < blocks // 2 else None


def _look_up(table: list[Expr], bits: int, low: Expr, top: Expr) -> Expr:
    """Four bytes of a table of 2^(bits + 1), by low codes and top bits in nibbles."""
    if bits == 2:
        return prmt(table[0], table[1], low | (top & u32(0x1111)) << u32(2))
    mask = scalar(spread_nibbles(top & u32(0x1111)) * u32(255))
    return lop3(prmt(table[2], table[3], low), mask, prmt(table[0], table[1], low), CHOOSE)
