"""A trellis's values by the codes they depend on, in shared memory, on CUDA: two neighbouring dims by one lookup.

An element's state is its code and those before it, 8 bits in all (``formats.trellis``), so two neighbours' values
depend on 8 + bits bits: their *window*. A table holds both values, as 16 bits, of every window. It stands in shared
memory in as many copies as 64 KB hold, each on banks of its own: at 2 bits every lane has one (no conflicts), at 3 bits
two lanes share one, at 4 bits four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.backend.cuda import op as cuda
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codec
from rotquant_tvm.formats.trellis import Trellis

from .code_fragments_cuda import fine_grid
from .cuda_ops import Registers, block_sync, ptx, scalar, store_words, u32

Expr = Any
TABLE_WORDS = 1 << 14
GRID_WORDS = 64
ROW_WORDS = 32
ADDRESS_BITS: dict[int, tuple[int, ...]] = {
    2: (12, 13, 8, 9, 14, 15, 10, 11, 1, 7),
    3: (12, 13, 14, 8, 9, 10, 5, 15, 7, 1, 11),
    4: (12, 13, 14, 15, 8, 9, 10, 11, 1, 5, 6, 7),
}
"""By bits per code: where in an address each bit of a window stands, the codes one above the other, the last lowest."""
LANE_BITS: dict[int, tuple[int, ...]] = {2: (2, 3, 4, 5, 6), 3: (2, 3, 4, 6), 4: (2, 3, 4)}
"""By bits per code: the bits of an address that are a lane's lowest ones and choose its copy."""


def is_trellis(codec: Codec) -> bool:
    """Whether a codec's values come from a trellis."""
    return isinstance(codec.codebook, Trellis)


class TrellisTables:
    """The tables of a kernel's formats, one for every bit width, from word ``first`` of ``shared``, a multiple of 4."""

    def __init__(self, codecs: Sequence[Codec], shared: Any, first: int) -> None:
        self.shared = shared
        self.books: dict[int, Any] = {codec.format.bits: codec.codebook for codec in codecs if is_trellis(codec)}
        size = TABLE_WORDS + GRID_WORDS
        self._first = {bits: first + n * size for n, bits in enumerate(self.books)}
        self._addresses: dict[int, Expr] = {}

    @staticmethod
    def words(codecs: Sequence[Codec]) -> int:
        """Words of shared memory that the tables take."""
        return len({codec.format.bits for codec in codecs if is_trellis(codec)}) * (TABLE_WORDS + GRID_WORDS)

    def fill(self, thread: Expr, threads: int) -> None:
        """Write the tables, by all threads of the block; ends with a barrier if there are any."""
        for bits, book in self.books.items():
            grid = np.ascontiguousarray(fine_grid(book)[0]).view(np.uint32)
            at = self._first[bits] + TABLE_WORDS
            for start in range(0, GRID_WORDS, threads):
                index = scalar(thread + start)
                with T.If(index < GRID_WORDS), T.Then():
                    T.buffer_store(self.shared, _select(index, [int(word) for word in grid]), [at + index])
        if self.books:
            block_sync()
        for bits in self.books:
            with T.serial(0, -(-TABLE_WORDS // (ROW_WORDS * threads))) as turn:
                row = scalar(turn * threads + thread)
                with T.If(row < TABLE_WORDS // ROW_WORDS), T.Then():
                    self._fill_row(bits, row)
        if self.books:
            block_sync()

    def _fill_row(self, bits: int, row: Expr) -> None:
        """Write 128 bytes: bits 1, 5 and 6 of an address tell a row's words apart, all others are copies."""
        inner = [at for at in (5, 6) if at in ADDRESS_BITS[bits]]
        words = []
        for number in range(2 ** len(inner)):
            chosen = sum((number >> k & 1) << at for k, at in enumerate(inner))
            low, high = (self._entry(bits, row, chosen + 2 * upper) for upper in range(2))
            words.append(scalar(low | high << u32(16)))
        # Neighbouring threads begin at others of the row's eight chunks, on other banks.
        turn = scalar(row % 8)
        shift = sum((turn >> (at - 4) & 1) << k for k, at in enumerate(inner))
        turned = [scalar(_pick(shift ^ number, words)) for number in range(len(words))]
        for step in range(8):
            number = sum((step >> (at - 4) & 1) << k for k, at in enumerate(inner))
            place = self._first[bits] + row * ROW_WORDS + (turn ^ step) * 4
            store_words(self.shared, [place], [turned[number]] * 4, "shared")

    def _entry(self, bits: int, row: Expr, rest: int) -> Expr:
        """The two values at an address, by its bits above 6 (the row's number, from −32768 on) and the rest."""
        above = u32(row) ^ u32(1 << 15 - 7)
        window = u32(0)
        for target, source, count in _runs(ADDRESS_BITS[bits]):
            ones = (1 << count) - 1
            known = source < 7
            part = u32(rest >> source & ones) if known else above >> u32(source - 7) & u32(ones)
            window = window | part << u32(target)
        window = scalar(window)
        first, second = (self._point(bits, window >> u32(shift) & u32(255)) for shift in (bits, 0))
        return first | second << u32(8)

    def _point(self, bits: int, state: Expr) -> Expr:
        cell = Registers(1)
        ptx("ld.shared.u8", cell[0], self._address(bits) + u32(4 * TABLE_WORDS) + state)
        return cell[0]

    def _address(self, bits: int) -> Expr:
        if bits not in self._addresses:
            address = cuda.cuda_cvta_generic_to_shared(self.shared.ptr_to([self._first[bits]]))
            self._addresses[bits] = scalar(u32(address))
        return self._addresses[bits]

    def middle(self, bits: int) -> Expr:
        """The address of the middle of a table."""
        return scalar(self._address(bits) + u32(2 * TABLE_WORDS))


def _runs(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bits that stand side by side on both sides, none across bit 7: (first target, first source, how many)."""
    runs: list[tuple[int, int, int]] = []
    for target, source in enumerate(places):
        if runs and runs[-1][1] + runs[-1][2] == source != 7:
            first, at, count = runs[-1]
            runs[-1] = first, at, count + 1
        else:
            runs.append((target, source, 1))
    return runs


def _select(index: Expr, words: list[int]) -> Expr:
    if len(words) == 1:
        return u32(words[0])
    half = len(words) // 2
    return tir.Select(tir.bitwise_and(index, half) == 0, _select(index, words[:half]), _select(index, words[half:]))


def _pick(number: Expr, words: Sequence[Expr]) -> Expr:
    chosen = words[0]
    for k in range(1, len(words)):
        chosen = tir.Select(number == k, words[k], chosen)
    return chosen
