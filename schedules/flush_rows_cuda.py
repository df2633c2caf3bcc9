"""The rows of one block of tokens in shared memory, on CUDA: from the 16-bit ring and from the new tokens."""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_ops import WARP, Registers, bits_of, half2, i32, load_words, ptx, scalar, shared_array, store_words, u32
from .tile_rows_cuda import ROWS, HalfTileRows, brain2, clip, commit_copies

Expr = Any


class BlockRows:
    """Rows of ``size`` keys, then of as many values, in shared memory of their own.

    float16 tokens are copied as they are. Others do not have the ring's type: all rows are float32 then.
    """

    def __init__(self, shape: SiteShape, size: int) -> None:
        """Plan it, emitting nothing."""
        self.head_dim, self.size, self.policy = shape.head_dim, size, shape.cache_policy
        self.source_dtype = shape.dtype
        self.dtype = "float16" if shape.dtype == "float16" else "float32"
        self.each = HalfTileRows.halves(shape.head_dim, self.dtype)
        self.pitch = self.each // ROWS

    @property
    def halves(self) -> int:
        """uint16 elements of shared memory."""
        return 2 * self.size * self.pitch

    def prepare(self, plain: Any, new: list[Any], where: tuple[Expr, Expr], start: Expr, thread: Expr) -> None:
        """Allocate the rows; ``start`` is the position of the first new token."""
        self.shared = shared_array(self.halves, "uint16")
        self.plain, self.new, self.where = plain, new, where
        self.start, self.lane = scalar(start), scalar(thread % WARP)

    def half(self, role: int, number: Expr, lane: Expr) -> HalfTileRows:
        """Half tile number ``number`` of the block."""
        first = scalar(number * self.each + role * (self.size * self.pitch))
        return HalfTileRows(self.shared, self.head_dim, self.dtype, first, lane)

    def key(self, row: Expr, dim: Expr) -> Expr:
        """An element of a key, as float32, clipped as formats store it."""
        if self.dtype == "float16":
            half = tir.reinterpret("float16", self.shared[row * self.pitch + dim])
            return clip(scalar(half.astype("float32")))
        value = Registers(1, "float32")
        load_words(value, 0, self.shared, [row * self.pitch + dim * 2], 1, "shared")
        return clip(value[0])

    def copy(self, task: Expr, base: Expr, tokens: tuple[Expr, Expr]) -> None:
        """Copy the rows of tile ``task`` / 2, of keys if it is even, where ``tokens`` are; zeros elsewhere.

        ``base`` is the number, behind the sinks, of the block's first token.
        """
        first = scalar(task // 2 * TOKENS)
        for role in range(2):
            with T.If(tir.all(task % 2 == role, task < 2 * self.size // TOKENS)), T.Then():
                units = self.head_dim * (2 if self.dtype == "float32" else 1) // 8
                with T.serial(0, units * TOKENS // WARP) as step:
                    unit = scalar(self.lane + step * WARP)
                    row = scalar(first + unit // units)
                    number = scalar(base + row)
                    at = [role * (self.size * self.pitch) + row * self.pitch + unit % units * 8]
                    wanted = scalar(tir.all(number >= tokens[0], number < tokens[1]).astype("int32"))
                    self._copy_unit(role, at, number, unit % units * (8 if self.dtype == "float16" else 4), wanted)
        commit_copies()

    def _copy_unit(self, role: int, at: list[Expr], number: Expr, element: Expr, wanted: Expr) -> None:
        arrived = scalar(number + self.policy.sinks - self.start)
        row = tir.max(tir.min(arrived, i32(self.new[role].shape[2]) - 1), i32(0)).astype("int64")
        fresh = (self.new[role], [*self.where, row, element], self.source_dtype)
        if not self.policy.ring:
            self._from(*fresh, at, wanted)
            return
        slot = (number % self.policy.ring + self.policy.sinks).astype("int64")
        with T.If(arrived >= 0):
            with T.Then():
                self._from(*fresh, at, wanted)
            with T.Else():
                self._from(self.plain, [*self.where, role, slot, element], "float16", at, wanted)

    def _from(self, array: Any, index: list[Expr], dtype: str, at: list[Expr], wanted: Expr) -> None:
        """Copy 16 bytes of a row, or convert what becomes them."""
        if dtype == self.dtype:
            size = tir.Select(wanted != 0, u32(16), u32(0))
            ptx("cp.async.cg.shared.global", self.shared.ptr_to(at), array.ptr_to(index), 16, size)
            return
        words = Registers(2)
        words.fill(u32(0))
        with T.If(wanted != 0), T.Then():
            load_words(words, 0, array, index, 2, "global")
        unpack = half2 if dtype == "float16" else brain2
        values = [bits_of(scalar(value)) for word in words for value in unpack(word)]
        store_words(self.shared, at, values, "shared")
