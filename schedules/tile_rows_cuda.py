"""Rows of 16 tokens on their way to the tensor cores, on CUDA: copied ahead into shared memory, a warp's own.

Eight rows' reads of the same 16 bytes must lie in different banks. So rows are 16 bytes longer than a vector, an odd
number of 16-byte units; or, where copies are many, as long as it, with row r's unit n in place n xor r % 8 (a copy to
rows that are not aligned to 128 bytes takes more than twice as long).
float16 and bfloat16 rows are operands as they are, as a left factor (tokens as rows) and as a right one (tokens as
columns). A float32 element is the sum of three bfloat16, so that its products are exact too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import HALF_MAX

from .cuda_ops import (
    WARP,
    Registers,
    bits_of,
    f32,
    float_of,
    half2,
    i32,
    load_words,
    ptx,
    scalar,
    store_words,
    u32,
    warp_sync,
)

Expr = Any
ROWS = 16
BRAIN_LIMIT = 0x477F
"""65280, the largest bfloat16 within the finite float16 range; 224 more are the limit of stored values."""
BRAIN_REST = 0x4360

Source = Callable[[Expr, Expr], tuple[Any, list[Expr]]]
"""(row, element) -> the array and index that 16 bytes of a row come from."""


def clip(value: Expr) -> Expr:
    """NaN becomes 0; everything else is clipped to the finite float16 range."""
    number = bits_of(value) & u32(0x7FFFFFFF) <= u32(0x7F800000)
    return scalar(tir.Select(number, tir.max(tir.min(value, f32(HALF_MAX)), f32(-HALF_MAX)), f32(0)))


def pack_brain2(low: Expr, high: Expr) -> Expr:
    """Two float32 as a word of two bfloat16, ``low`` first."""
    cell = Registers(1)
    ptx("cvt.rn.bf16x2.f32", cell[0], high, low)
    return cell[0]


def brain2(word: Expr) -> tuple[Expr, Expr]:
    """The two bfloat16 of a word, as float32."""
    return float_of(word << u32(16)), float_of(word & u32(0xFFFF0000))


class HalfTileRows:
    """16 rows of ``head_dim`` elements ``dtype`` in a warp's shared memory."""

    def __init__(
        self, shared: Any, head_dim: int, dtype: str, first: Expr, lane: Expr, swizzled: bool = False
    ) -> None:
        """``shared``: uint16; ``first``: where the rows begin there, a multiple of 8 (64 if ``swizzled``)."""
        self.shared, self.head_dim, self.dtype, self.first, self.lane = shared, head_dim, dtype, first, lane
        self.single = dtype == "float32"
        self.unit = 4 if self.single else 8
        """Elements to 16 bytes."""
        self.swizzled = swizzled
        self.pitch = self.halves(head_dim, dtype, swizzled) // ROWS

    @staticmethod
    def halves(head_dim: int, dtype: str, swizzled: bool = False) -> int:
        """uint16 elements that the rows take."""
        return ROWS * (head_dim * (2 if dtype == "float32" else 1) + (0 if swizzled else 8))

    @staticmethod
    def can_swizzle(head_dim: int, dtype: str) -> bool:
        """Whether a vector is a multiple of 128 bytes."""
        return head_dim * (2 if dtype == "float32" else 1) % 64 == 0

    def _place(self, row: Expr, unit: Expr, rows: int = 0, units: int = 0) -> Expr:
        """Where the 16 bytes number ``unit + units`` of row ``row + rows`` begin.

        The constants share no bits with what they are added to (of rows, none below 8).
        """
        if not self.swizzled:
            return self.first + (row * self.pitch + unit * 8) + (rows * self.pitch + units * 8)
        place = self.first + (row * self.pitch + (unit ^ row % 8) * 8)
        mask = (rows ^ units) % 8 * 8
        return (place ^ mask if mask else place) + (rows * self.pitch + units // 8 * 64)

    @property
    def operand(self) -> str:
        """The tensor cores' name of the operands' type."""
        return "f16" if self.dtype == "float16" else "bf16"

    # Copies

    def copy(self, source: Source) -> None:
        """Start copying all rows, 16 bytes to a lane and step."""
        for step in range(self.head_dim // self.unit * ROWS // WARP):
            array, index, to = self._unit_of(source, step)
            ptx("cp.async.cg.shared.global", to, array.ptr_to(index), 16)

    def copy_some(self, source: Source, first: Expr, last: Expr) -> None:
        """Start copying rows ``first`` … ``last`` - 1; the others become zeros."""
        with T.serial(0, self.head_dim // self.unit * ROWS // WARP) as step:
            row, _ = self._row_and_unit(i32(step))
            array, index, to = self._unit_of(source, i32(step))
            size = tir.Select(tir.all(row >= first, row < last), u32(16), u32(0))
            ptx("cp.async.cg.shared.global", to, array.ptr_to(index), 16, size)

    def _row_and_unit(self, step: Any) -> tuple[Expr, Expr]:
        """What this lane copies in a step: which row, and which 16 bytes of it."""
        units = self.head_dim // self.unit
        if WARP % units == 0:
            return self.lane // units + step * (WARP // units), self.lane % units
        number = self.lane + step * WARP
        return number // units, number % units

    def _unit_of(self, source: Source, step: Any) -> tuple[Any, list[Expr], Expr]:
        row, unit = self._row_and_unit(step)
        array, index = source(row, unit * self.unit)
        place = self._place(row, unit)
        if isinstance(step, int) and WARP % (self.head_dim // self.unit) == 0:
            place = self._place(*self._row_and_unit(0), rows=step * (WARP // (self.head_dim // self.unit)))
        return array, index, self.shared.ptr_to([place])

    # Operands

    def operands(self, k: int, left: bool) -> list[list[Expr]]:
        """Dims 16k … as operands of four words, one for each of the terms that an element is the sum of.

        Words of right operands: two for tokens 0 … 7, two for the others.
        """
        lane = self.lane
        if left:
            return self._operand(k, lane % 16, lane // 16, ((0, 0), (1, 0), (0, 1), (1, 1)))
        return self._operand(k, lane % 8 + lane // 16 * 8, lane // 8 % 2, ((0, 0), (0, 1), (1, 0), (1, 1)))

    def rests(self, k: int, left: bool) -> list[list[Expr]]:
        """As ``operands``: what ``clip_rows`` will take away from bfloat16 rows beyond the limit of stored values."""
        return [[scalar(_each_half(word, _rest)) for word in term] for term in self.operands(k, left)]

    def _operand(self, k: int, row: Expr, eight: Expr, order: Sequence[tuple[int, int]]) -> list[list[Expr]]:
        """``row`` and ``eight``: which 8 dims of which token this lane's address of 16 bytes is; ``order``: (a, w)."""
        words = Registers(4)
        if not self.single:
            at = self.shared.ptr_to([self._place(row, eight, units=2 * k)])
            ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *(words[n] for n in range(4)), at)
            return [list(words)]
        pairs = [self._pair(k, a, w) for a, w in order]
        terms = []
        for _ in range(3):
            packed = [pack_brain2(*pair) for pair in pairs]
            terms.append(packed)
            known = [brain2(word) for word in packed]
            pairs = [[scalar(x - y) for x, y in zip(*both, strict=True)] for both in zip(pairs, known, strict=True)]
        return terms

    def _pair(self, k: int, a: int, word: int) -> list[Expr]:
        """Dims 16k + 8·word + 2t and the next of token 8a + g, clipped."""
        pair = Registers(2, "float32")
        t = self.lane % 4
        at = self._place(self.lane // 4, t // 2, 8 * a, 2 * word + 4 * k) + t % 2 * 4
        load_words(pair, 0, self.shared, [at], 2, "shared")
        return [clip(value) for value in pair]

    def four(self, k: int, a: int) -> list[Expr]:
        """Dims 16k + 4t … 16k + 4t + 3 of token 8a + g as float32, clipped as formats store them."""
        width = 4 if self.single else 2
        words = Registers(width)
        t, row = self.lane % 4, self.lane // 4
        if self.single:
            at = self._place(row, t, 8 * a, 4 * k)
        else:
            at = self._place(row, t // 2, 8 * a, 2 * k) + t % 2 * 4
        load_words(words, 0, self.shared, [at], width, "shared")
        if self.single:
            return [clip(float_of(word)) for word in words]
        unpack = half2 if self.dtype == "float16" else brain2
        return [clip(value) for word in words for value in unpack(word)]

    # Elements beyond the finite float16 range

    @property
    def proof(self) -> float | None:
        """A squared norm up to which no element can be beyond; None if elements are clipped as they are read."""
        if self.single:
            return None
        return 1.01 * self.head_dim * HALF_MAX**2 if self.dtype == "float16" else HALF_MAX**2

    def clip_rows(self) -> None:
        """Clip the rows where they lie (bfloat16 to the largest number that it has)."""
        units = self.head_dim // 8
        warp_sync()
        with T.serial(0, units * ROWS // WARP) as step:
            number = self.lane + step * WARP
            at = [self._place(number // units, number % units)]
            words = Registers(4)
            load_words(words, 0, self.shared, at, 4, "shared")
            clipped = [scalar(_each_half(word, self._clipped)) for word in words]
            store_words(self.shared, at, clipped, "shared")
        warp_sync()

    def _clipped(self, half: Expr) -> Expr:
        largest, infinite = (0x7BFF, 0x7C00) if self.dtype == "float16" else (BRAIN_LIMIT, 0x7F80)
        magnitude = half & u32(0x7FFF)
        kept = half & u32(0x8000) | tir.min(magnitude, u32(largest))
        return tir.Select(magnitude > u32(infinite), u32(0), kept)


def _rest(half: Expr) -> Expr:
    magnitude = half & u32(0x7FFF)
    beyond = tir.all(magnitude > u32(BRAIN_LIMIT), magnitude <= u32(0x7F80))
    return tir.Select(beyond, half & u32(0x8000) | u32(BRAIN_REST), u32(0))


def _each_half(word: Expr, change: Callable[[Expr], Expr]) -> Expr:
    return change(word & u32(0xFFFF)) | change(word >> u32(16)) << u32(16)


def commit_copies() -> None:
    """Close a group of copies."""
    ptx("cp.async.commit_group")


def wait_for_copies(pending: int) -> None:
    """Wait for this warp's copies but those of the last ``pending`` groups."""
    ptx("cp.async.wait_group", pending)
    warp_sync()


def multiply(
    total: Registers,
    at: int,
    left: Sequence[Expr],
    right: Sequence[Expr],
    operand: str,
    before: Registers | None = None,
) -> None:
    """total[at … at+3] = before[at … at+3] (``total`` itself, if none) + left·right, 16×16 by 16×8, float32 sums."""
    lanes = [total[at + k] for k in range(4)]
    added = lanes if before is None else [before[at + k] for k in range(4)]
    ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.{operand}.{operand}.f32", *lanes, *left, *right, *added)


def multiply_eight(total: Registers, left: Sequence[Expr], right: Expr, operand: str) -> None:
    """total[0 … 3] += left·right, 16×8 by 8×8, float32 sums."""
    lanes = list(total)
    ptx(f"mma.sync.aligned.m16n8k8.row.col.f32.{operand}.{operand}.f32", *lanes, *left, right, *lanes)
