"""From rotated elements to codes and centroids on CUDA, without divergence and without a loop over boundaries.

On its int8 grid a codebook is antisymmetric, and its boundaries are halves of integers. Two ways to use that:

- *steps*: g_0 + Σ δ_i · [|y| > b_i·‖x‖] with y's sign, over the upper half. A comparison that gives 1.0 or 0.0 and a
  multiply-add per boundary: 3 instructions at 2 bits, 7 at 3, 15 at 4.
- *table*: ⌈2y / (scale·‖x‖)⌉, clipped, numbers the pieces between halves of integers, and a table in shared memory
  says what code each has: 4 instructions at any width. One saturating multiply-add clips; another adds 2.0 rounding
  up, which leaves the number in the low bits of the sum, whose upper ones vanish when it becomes a byte address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codebook

from .cuda_ops import Registers, bits_of, f32, float_of, ptx, scalar, u32

Expr = Any
SIGN = 0x80000000
HALF_SHIFT = 16
_TWO = 0x40000000
"""The bits of float32's 2.0, no part of a byte address of words."""
_ONE_UP = 2.0**-22
"""The distance of float32 numbers from 2.0 on."""


class CodeLookup:
    """The codebook of one kernel.

    ``values`` of a vector are float32 numbers of the int8 grid; with ``codes``, words instead: the code in the lower
    half, the grid value as float16 in the upper.
    """

    def __init__(self, book: Codebook, *, codes: bool, table: bool) -> None:
        """Plan it; codes of 2 bits and more are looked up in a table whatever ``table`` says."""
        self.book, self.codes = book, codes
        self.uses_table = book.bits > 1 and (table or codes)
        grid = book.grid.astype(int)
        self._thresholds = [int(v) for v in grid[1:] + grid[:-1]]
        """Boundaries in half steps of the grid."""
        self._range = self._thresholds[-1] + 1
        self._entries: Any = None

    def load(self, thread: Expr, threads: int) -> None:
        """Fill the table, if any; the block must be waited for after it."""
        if not self.uses_table:
            return
        self._entries = T.alloc_buffer((2 * self._range + 1,), "uint32", scope="shared")
        with T.serial(0, -(-(self._range + 1) // threads)) as step:
            place = scalar(thread + step * threads)
            with T.If(place <= self._range), T.Then():
                upper, lower = self._entry(place)
                T.buffer_store(self._entries, lower, [self._range - place])
                with T.If(place < self._range), T.Then():
                    T.buffer_store(self._entries, upper, [self._range + 1 + place])

    def _entry(self, place: Expr) -> tuple[Expr, Expr]:
        """What values from ``place`` to ``place`` + 1 half steps above 0 have in common, and those as far below.

        Sums, since the compiler would make branches of nested selections.
        """
        half = 2 ** (self.book.bits - 1)
        grid = self.book.grid[half:].astype(int)
        value, code = tir.const(int(grid[0]), "int32"), u32(half)
        for threshold, step in zip(self._thresholds[half:], np.diff(grid), strict=True):
            above = place >= threshold
            value = value + tir.Select(above, tir.const(int(step), "int32"), tir.const(0, "int32"))
            code = code + above.astype("uint32")
        number, code = scalar(value.astype("float32")), scalar(code)
        if not self.codes:
            return bits_of(number), bits_of(-number)
        bits = scalar(tir.reinterpret("uint16", number.astype("float16")).astype("uint32") << u32(HALF_SHIFT))
        return bits | code, bits ^ u32(SIGN) | (u32(2 * half - 1) - code)

    def _word(self, code: int) -> int:
        value = self.book.grid[code]
        if self.codes:
            return int(np.float16(value).view(np.uint16)) << HALF_SHIFT | code
        return int(np.float32(value).view(np.uint32))

    def select(self, vectors: Sequence[Registers], norms: Sequence[Expr], inverses: Sequence[Expr]) -> list[Registers]:
        """The values of rotated vectors; ``norms`` are those of the vectors, ``inverses`` 1 over them (0 for 0)."""
        choose = self._by_table if self.uses_table else self._by_steps
        return [choose(y, norm, inverse) for y, norm, inverse in zip(vectors, norms, inverses, strict=True)]

    def _by_table(self, y: Registers, norm: Expr, inverse: Expr) -> Registers:
        found = Registers(y.count, "uint32" if self.codes else "float32")
        control = Registers(2, "float32")
        control[0] = inverse * f32(1 / (float(self.book.scale) * self._range))
        # The middle code of a vector of zeros is the one just above 0.
        control[1] = tir.Select(norm > f32(0), f32(0.5), f32(0.5 + 0.5 / self._range))
        number = Registers(y.count, "float32")
        for r in range(y.count):
            ptx("fma.rn.ftz.sat.f32", number[r], y[r], control[0], control[1])
            ptx("fma.rp.ftz.f32", number[r], number[r], f32(2 * self._range * _ONE_UP), f32(2.0))
            place = (bits_of(number[r]) - u32(_TWO)).astype("int32")
            word = self._entries[place]
            found[r] = word if self.codes else float_of(word)
        return found

    def _by_steps(self, y: Registers, norm: Expr, inverse: Expr) -> Registers:
        if self.codes:
            return self._by_signs(y, norm)
        upper = self.book.grid[2 ** (self.book.bits - 1) :].astype(float)
        boundaries = Registers(max(1, len(upper) - 1), "float32")
        for k, boundary in enumerate(self.book.boundaries[2 ** (self.book.bits - 1) :]):
            boundaries[k] = norm * f32(float(boundary))
        found = Registers(y.count, "float32")
        for r in range(y.count):
            total: Expr = scalar(f32(upper[0]), "float32")
            for k, step in enumerate(np.diff(upper)):
                above = Registers(1, "float32")
                ptx("set.gt.ftz.f32.f32", above[0], tir.abs(y[r]), boundaries[k])
                total = scalar(above[0] * f32(float(step)) + total)
            found[r] = float_of(bits_of(total) | bits_of(y[r]) & u32(SIGN))
        return found

    def _by_signs(self, y: Registers, norm: Expr) -> Registers:
        """Words of one bit; a vector of zeros, some of them negative, has the upper code throughout."""
        found = Registers(y.count, "uint32")
        least = scalar(tir.Select(norm > f32(0), f32(0), f32(-1)))
        for r in range(y.count):
            found[r] = tir.Select(y[r] > least, u32(self._word(1)), u32(self._word(0)))
        return found

    def grid_value(self, value: Expr) -> Expr:
        """The float32 grid value of one of ``values``."""
        if not self.codes:
            return value
        half = tir.reinterpret("float16", (value >> u32(HALF_SHIFT)).astype("uint16"))
        return half.astype("float32")
