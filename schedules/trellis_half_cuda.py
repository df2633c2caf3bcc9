"""Trellis codes as float16, on CUDA: states from neighbouring lanes' codes, their values from a table in shared memory.

A state is made of a dimension's code and of those before it (``formats.trellis``). In the keys' order four dims are the
bytes of a word and the ones before them the word of the lane before; in the values' order a word is four tokens of one
dim, and the dims before it are other lanes' words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats.trellis import STATE_BITS, Trellis

from .cuda_ops import Registers, prmt, ptx, scalar, shuffle, store_words, u32
from .packed_half_cuda import GRID, Group, Nibbles, PackedRole, spread_nibbles

Expr = Any


def store_table(shared: Any, first: Expr, points: Sequence[int], thread: Expr, threads: int) -> None:
    """Fill a table of float16, grid points over ``GRID``; the block's threads wait for each other before they read."""
    words = (np.array(points, np.float32) / np.float32(GRID)).astype(np.float16).view(np.uint32)
    for step in range(-(-len(words) // threads)):
        index = scalar(thread + step * threads)
        with T.If(index < len(words)), T.Then():
            value = _select(index, [int(word) for word in words])
            store_words(shared, [first + index * 2], [scalar(value)], "shared")


def _select(index: Expr, words: list[int]) -> Expr:
    if len(words) == 1:
        return u32(words[0])
    half = len(words) // 2
    return tir.Select(tir.bitwise_and(index, half) == 0, _select(index, words[:half]), _select(index, words[half:]))


def trellis_groups(book: Trellis, tile: PackedRole) -> Group:
    """The groups of one tile."""
    bytes_of = _code_bytes(book.bits, tile)
    before = (_before_keys if tile.role == 0 else _before_values)(bytes_of, tile)
    bits, count = book.bits, -(-STATE_BITS // book.bits)

    def half(place: int) -> list[Expr]:
        states = scalar(bytes_of(place))
        for back in range(1, count):
            code = before(place, back)
            fits = min(bits, STATE_BITS - back * bits)
            kept = code & u32((2**fits - 1) * 0x01010101) if fits < bits else code
            states = scalar(states | kept << u32(back * bits))
        return _look_up(states, tile)

    return lambda number: half(2 * number) + half(2 * number + 1)


def _look_up(states: Expr, tile: PackedRole) -> list[Expr]:
    """Values of the four states in a word's bytes, two to a word."""
    pairs = []
    for pair in range(2):
        values = Registers(2, "uint16")
        for k in range(2):
            state = (states >> u32(8 * (2 * pair + k)) & u32(0xFF)).astype("int32")
            ptx("ld.shared.u16", values[k], tile.words.shared.ptr_to([tile.table + state]))
        pairs.append(scalar(values[0].astype("uint32") | values[1].astype("uint32") << u32(16)))
    return pairs


def _code_bytes(bits: int, tile: PackedRole) -> Callable[[int], Expr]:
    """The four codes of a half, by its number 2·group + half, as bytes; each is worked out once."""
    nibbles = Nibbles(tile.words, bits, tile.head_dim) if bits < 4 else None
    known: dict[int, Expr] = {}

    def codes(place: int) -> Expr:
        if place not in known:
            group, half = divmod(place, 2)
            if nibbles is not None:
                known[place] = spread_nibbles(nibbles.group(group) >> u32(16 * half))
            else:
                word = tile.words[group]
                top = (word >> u32(4) if half == 0 else word) & u32(0x08080808)  # where ``formats.packing`` puts bit 3
                known[place] = scalar(spread_nibbles(word >> u32(16 * half) & u32(0x7777)) | top)
        return known[place]

    return codes


def _before_keys(bytes_of: Callable[[int], Expr], tile: PackedRole) -> Callable[[int, int], Expr]:
    """Codes so many dims back: half i·d/16 + h holds dims 16h + 4t …, what precedes them is lane t - 1's."""
    blocks, lane = tile.head_dim // 16, tile.lane
    neighbour = scalar(lane // 4 * 4 + (lane + 3) % 4)
    turned: dict[int, Expr] = {}
    known: dict[int, Expr] = {}

    def turn(place: int) -> Expr:
        if place not in turned:
            turned[place] = shuffle(bytes_of(place), neighbour)
        return turned[place]

    def before(place: int, back: int) -> Expr:
        if place not in known:
            i, h = divmod(place, blocks)
            known[place] = scalar(tir.Select(lane % 4 == 0, turn(i * blocks + (h - 1) % blocks), turn(place)))
        # The last bytes of the word before, then the first ones of the word itself.
        selector = {1: 0x6543, 2: 0x5432, 3: 0x4321}[back]
        return prmt(known[place], bytes_of(place), u32(selector))

    return before


def _before_values(bytes_of: Callable[[int], Expr], tile: PackedRole) -> Callable[[int, int], Expr]:
    """Codes so many dims back: half (2j + x, hf) holds dim 16j + 8hf + g, what precedes it is lane g - back's."""
    blocks, lane = tile.head_dim // 16, tile.lane
    turned: dict[tuple[int, int], Expr] = {}

    def turn(place: int, back: int) -> Expr:
        if (place, back) not in turned:
            turned[place, back] = shuffle(bytes_of(place), (lane + (32 - 4 * back)) % 32)
        return turned[place, back]

    def before(place: int, back: int) -> Expr:
        j, x, half = place // 4, place // 2 % 2, place % 2
        eight = (2 * j + half - 1) % (2 * blocks)
        earlier = eight // 2 * 4 + x * 2 + eight % 2
        return scalar(tir.Select(lane // 4 < back, turn(earlier, back), turn(place, back)))

    return before
