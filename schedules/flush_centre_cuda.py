"""The centre of a block of keys, on CUDA: taken from the block's rows in shared memory, stored, and subtracted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats.centre import LIMIT
from rotquant_tvm.ops.centre import centre_element

from .cuda_ops import WARP, Registers, across, bits_of, block_sync, f32, load_words, scalar, store_words, u32
from .flush_rows_cuda import BlockRows

Expr = Any


class BlockCentre:
    """The mean key of a block as it is stored: codes times one scale (``formats.centre``)."""

    def __init__(self, head_dim: int, rows: BlockRows, threads: int) -> None:
        """Plan it, emitting nothing."""
        self.head_dim, self.rows, self.threads = head_dim, rows, threads

    @property
    def nbytes(self) -> int:
        """Shared memory of a thread block."""
        return 8 * self.head_dim

    def allocate(self) -> None:
        """Allocate the shared memory."""
        self._exact, self._mean = (T.alloc_buffer((self.head_dim,), "float32", scope="shared") for _ in range(2))

    def take(
        self, centre: Any, block: tuple[Expr, Expr, Expr], begun: Expr, span: tuple[Expr, Expr], thread: Expr
    ) -> None:
        """Take the mean of ``span`` = (first row, count) and store it; read the stored one if the block was ``begun``.

        For all threads, which have waited for the rows; they have waited for each other when it is done.
        """
        with T.If(begun != 0):
            with T.Then():
                stored = lambda dim: T.buffer_store(self._mean, centre_element(centre, block, dim), [dim])  # noqa: E731
                self._each(self.head_dim, thread, stored)
            with T.Else():
                self._each(self.head_dim, thread, lambda dim: self._average(dim, span))
                block_sync()
                scale = self._scale(thread)
                self._each(self.head_dim // 4, thread, lambda word: self._store_word(centre, block, word, scale))
                with T.If(thread == 0), T.Then():
                    T.buffer_store(centre, bits_of(scale), [*block, self.head_dim // 4])
        block_sync()

    def _each(self, count: int, thread: Expr, emit: Callable[[Expr], None]) -> None:
        for first in range(0, count, self.threads):
            number = scalar(thread + first)
            with T.If(number < count), T.Then():
                emit(number)

    def _average(self, dim: Expr, span: tuple[Expr, Expr]) -> None:
        first, count = span
        total = Registers(1, "float32")
        total[0] = f32(0)
        with T.serial(0, count) as step:
            total[0] = total[0] + self.rows.key(first + step, dim)
        T.buffer_store(self._exact, total[0] / f32(count), [dim])

    def _scale(self, thread: Expr) -> Expr:
        """Every warp finds it."""
        largest = Registers(1, "float32")
        largest[0] = f32(0)
        for first in range(0, self.head_dim, WARP):
            dim = tir.min(thread % WARP + first, self.head_dim - 1)
            largest[0] = tir.max(largest[0], tir.abs(self._exact[dim]))
        return scalar(across(largest[0], tir.max, (16, 8, 4, 2, 1)) / f32(LIMIT))

    def _store_word(self, centre: Any, block: tuple[Expr, Expr, Expr], word: Expr, scale: Expr) -> None:
        """Four codes, and the elements that they stand for."""
        packed, divisor = u32(0), scalar(tir.Select(scale > f32(0), scale, f32(1)))
        for e in range(4):
            dim = word * 4 + e
            ratio = tir.max(tir.min(tir.nearbyint(self._exact[dim] / divisor), f32(LIMIT)), f32(-LIMIT))
            code = scalar(ratio.astype("int32"), "int32")
            packed = packed | (code.astype("uint32") & u32(0xFF)) << u32(8 * e)
            T.buffer_store(self._mean, code.astype("float32") * scale, [dim])
        store_words(centre, [*block, word], [scalar(packed)])

    def subtract(self, values: Registers, lane: Expr) -> None:
        """Subtract it from the keys of half a tile, in the order of a tile's lanes (``Lane``)."""
        four = Registers(4, "float32")
        for k in range(self.head_dim // 16):
            load_words(four, 0, self._mean, [lane % 4 * 4 + 16 * k], 4, "shared")
            for r in range(2):
                for e in range(4):
                    at = (k * 2 + e // 2) * 4 + r * 2 + e % 2
                    values[at] = values[at] - four[e]
