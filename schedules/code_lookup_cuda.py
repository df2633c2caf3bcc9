"""From rotated elements to codes and centroids on CUDA, without divergence and without a loop over boundaries.

On its int8 grid a codebook is antisymmetric, and its boundaries are halves of integers. Two ways to use that:

- *steps*: g_0 + Σ δ_i · [|y| / ‖x‖ > b_i] with y's sign, over the upper half. A comparison is a difference so steep
  that it saturates to 0.0 or 1.0, which a GPU does faster than a comparison; a multiply-add adds it up. With the
  quotient and the sign, 4 instructions at 2 bits, 8 at 3, 16 at 4.
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
from .stepped_table_cuda import fma

Expr = Any
SIGN = 0x80000000
HALF_SHIFT = 16
_TWO = 0x40000000
"""The bits of float32's 2.0, no part of a byte address of words."""
_ONE_UP = 2.0**-22
"""The distance of float32 numbers from 2.0 on."""
_STEEP = 2.0**40
"""Times this, the least difference of two float32 numbers about as large as a boundary is more than 1."""
_LITTLE = 2.0**-60
"""Next to a steep ratio, less than rounding unless that is 0."""


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
        # Without branches, which would hold up reads that stand before them: who has no place repeats the last one.
        for step in range(-(-(self._range + 1) // threads)):
            place = scalar(tir.min(thread + step * threads, self._range))
            upper, lower = self._entry(place)
            T.buffer_store(self._entries, lower, [self._range - place])
            T.buffer_store(self._entries, upper, [tir.min(self._range + 1 + place, 2 * self._range)])

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
        boundaries = self.book.boundaries[2 ** (self.book.bits - 1) :].astype(float)
        found, steep = Registers(y.count, "float32"), scalar(inverse * f32(_STEEP))
        for r in range(y.count):
            # A little less than the element, since one on a boundary has the lower code, one of 0 too.
            ratio = fma(y[r], steep, -_LITTLE)
            total: Expr = scalar(f32(upper[0]), "float32")
            for boundary, step in zip(boundaries, np.diff(upper), strict=True):
                above = fma(tir.abs(ratio), 1.0, -_STEEP * float(np.float32(boundary)), saturate=True)
                total = scalar(above * f32(float(step)) + total)
            found[r] = float_of(bits_of(total) | bits_of(ratio) & u32(SIGN))
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
