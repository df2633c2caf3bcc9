"""Centres of K in TensorIR: taking a block's mean key, storing it and reading it back (``formats.centre``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..formats.centre import LIMIT
from .axes import Axes
from .tile_access import u32
from .vector_code import f32, registers

Expr = Any


def centre_element(centre: Any, block: tuple[Expr, Expr, Expr], dim: Expr) -> Expr:
    """Element ``dim`` of the centre at ``block`` of an array uint32 [batch, kv_heads, blocks, d/4 + 1], as float32."""
    scale = tir.reinterpret("float32", centre[(*block, centre.shape[3] - 1)])
    byte = centre[(*block, dim // 4)] >> u32(dim % 4 * 8) & u32(0xFF)
    return byte.astype("uint8").astype("int8").astype("float32") * scale


class Centre:
    """The mean of some keys as it is stored: codes times one scale. Its scratch is shared by the lanes."""

    def __init__(self, axes: Axes, head_dim: int) -> None:
        self.axes, self.head_dim = axes, head_dim
        self._exact = T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch)
        self._scale = T.sblock_alloc_buffer((1,), "float32", scope=axes.scratch)

    def average(self, load: Callable[[Expr, Expr], Expr], first: Expr, count: Expr) -> None:
        """Average the ``count`` keys whose elements are ``load(first + i, dim)``; of none it is 0."""
        with self.axes.lanes(self.head_dim) as dim:
            total = registers(1)
            with T.serial(0, count) as step:
                T.buffer_store(total, total[0] + load(first + step, dim), [0])
            T.buffer_store(self._exact, total[0] / f32(tir.max(count, tir.const(1, count.ty.dtype))), [dim])
        with self.axes.lanes(1) as _:
            largest = registers(1)
            with T.serial(0, self.head_dim) as dim:
                T.buffer_store(largest, tir.max(largest[0], tir.abs(self._exact[dim])), [0])
            T.buffer_store(self._scale, largest[0] / f32(LIMIT), [0])

    def element(self, dim: Expr) -> Expr:
        """The centre's element, rounded as it is stored."""
        return self._code(dim).astype("float32") * self._scale[0]

    def word(self, word: Expr) -> Expr:
        """The stored word: four codes, or after the last of them the scale."""
        packed = u32(0)
        for e in range(4):
            at = tir.min(word * 4 + e, self.head_dim - 1)
            packed = packed | (self._code(at).astype("uint32") & u32(0xFF)) << u32(8 * e)
        return tir.Select(word < self.head_dim // 4, packed, tir.reinterpret("uint32", self._scale[0]))

    def _code(self, dim: Expr) -> Expr:
        scale = self._scale[0]
        ratio = tir.nearbyint(self._exact[dim] / tir.Select(scale > f32(0), scale, f32(1)))
        return tir.max(tir.min(ratio, f32(LIMIT)), f32(-LIMIT)).astype("int32")


class CentreWriter:
    """Takes the centre of one block and keeps it in ``mean``, a float32 buffer [head_dim] that the lanes share."""

    def __init__(self, axes: Axes, centre: Any, block: tuple[Expr, Expr, Expr], head_dim: int) -> None:
        self.axes, self.centre, self.block, self.head_dim = axes, centre, block, head_dim
        self._taken = Centre(axes, head_dim)
        self.mean = T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch)

    def take(self, load: Callable[[Expr, Expr], Expr], first: Expr, count: Expr) -> None:
        """Average the ``count`` keys from ``first`` on and store their centre; with none, read the stored one."""
        some = count > 0
        self._taken.average(load, first, count)
        last = self.centre.shape[2] - 1
        known = (*self.block[:2], tir.max(tir.min(self.block[2], last), tir.const(0, "int64")))
        with self.axes.lanes(self.head_dim) as dim:
            value = tir.Select(some, self._taken.element(dim), centre_element(self.centre, known, dim))
            T.buffer_store(self.mean, value, [dim])
        with self.axes.lanes(self.head_dim // 4 + 1) as word, T.If(some), T.Then():
            T.buffer_store(self.centre, self._taken.word(word), [*self.block, word])
