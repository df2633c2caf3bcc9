"""How every KV format's codes become float16, on CUDA; see ``packed_half_cuda``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rotquant_tvm.formats import Codebook, Codec, SplitCodebook
from rotquant_tvm.formats.linear import NIBBLE_ZERO
from rotquant_tvm.formats.trellis import Trellis

from .cuda_ops import float_of, pack_half2, u32
from .packed_half_cuda import (
    GRID,
    ByteFragments,
    Group,
    HalfFormat,
    PackedRole,
    clipped,
    expand_bytes,
    grid_points,
)
from .split_half_cuda import split_groups
from .trellis_half_cuda import trellis_groups

Expr = Any


def half_format(codec: Codec) -> HalfFormat | None:
    """Return how a codec's codes become float16; None for those that attention does not read."""
    kv_format, book = codec.format, codec.codebook
    gains = kv_format.gains_per_vector(codec.head_dim)
    if kv_format.codebook == "lloyd" and isinstance(book, Codebook):
        return HalfFormat(book.bits, GRID * float(book.scale), gains, _looked_up(grid_points(book.grid)))
    if isinstance(book, SplitCodebook):
        return HalfFormat(book.bits, GRID * float(book.wide.scale), gains, lambda tile: split_groups(book, tile))
    if isinstance(book, Trellis):
        factor, points = GRID * float(book.scale), tuple(grid_points(book.grid))
        return HalfFormat(book.bits, factor, gains, lambda tile: trellis_groups(book, tile), points)
    if kv_format.codebook == "linear" and kv_format.bits == 4:
        return HalfFormat(4, GRID / 16, gains, _looked_up([16 * (code - NIBBLE_ZERO) for code in range(16)]))
    if kv_format.codebook == "linear":
        return HalfFormat(8, GRID, gains, _own_bytes)
    if kv_format.codebook == "half":
        return HalfFormat(16, 1.0, 0, _own_halves)
    if kv_format.codebook == "bfloat16":
        return HalfFormat(16, 1.0, 0, _from_bfloat16)
    return None


def _looked_up(points: Sequence[int]) -> Callable[[PackedRole], Group]:
    def groups(tile: PackedRole) -> Group:
        fragments = ByteFragments(tile.words, points, tile.head_dim)
        return lambda number: [half for k in range(2) for half in expand_bytes(fragments.half(2 * number + k))]

    return groups


def _own_bytes(tile: PackedRole) -> Group:
    def group(number: int) -> list[Expr]:
        return [half for k in range(2) for half in expand_bytes(tile.words[2 * number + k] ^ u32(0x80808080))]

    return group


def _own_halves(tile: PackedRole) -> Group:
    return lambda number: [tile.words[4 * number + k] for k in range(4)]


def _from_bfloat16(tile: PackedRole) -> Group:
    def narrow(word: Expr) -> Expr:
        pair = [float_of(word << u32(16)), float_of(word & u32(0xFFFF0000))]
        return pack_half2(*(clipped(value) for value in pair))

    return lambda number: [narrow(tile.words[4 * number + k]) for k in range(4)]
