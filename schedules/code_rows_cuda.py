"""Codes of plain vectors, a byte or two each, and their gains, as a warp reads and decodes them on CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import LINEAR_BLOCK, NIBBLE_ZERO, Codebook
from rotquant_tvm.ops.codec_shape import CodecShape

from .cuda_ops import Registers, f32, float_of, half2, load_words, prmt, ptx, scalar, u32
from .held_rotation_cuda import HeldRotation
from .vector_lanes_cuda import ITEM_BYTES, VectorLanes

Expr = Any
_BYTE_FLOAT = 0x4B000000
"""A byte in the low bits of this word makes it the float32 2²³ + byte."""
_SIGN_BITS = 0x80808080


class CodeRows:
    """How the vectors of a format are read; a call makes a ``CodeRow`` to read vectors with."""

    def __init__(self, shape: CodecShape, lanes: VectorLanes) -> None:
        self.shape, self.lanes = shape, lanes
        self.book = Codebook(shape.bits, shape.head_dim) if shape.codebook == "lloyd" else None
        self.centroids: Any = None

    def __call__(self, lane: Expr) -> CodeRow:
        """Allocate what one of a lane's vectors is read into."""
        return CodeRow(self, lane)

    def fill(self, thread: Expr) -> None:
        """Fill the table of centroids, if any: there are at most 16, so the lanes' reads never meet in a bank."""
        if self.book is None:
            return
        count = len(self.book.centroids)
        self.centroids = T.alloc_buffer((count,), "float32", scope="shared")
        grid = self.book.grid.astype(int)
        value = tir.const(int(grid[0]), "int32")
        for code, step in enumerate(np.diff(grid), 1):
            value = value + tir.Select(thread >= code, tir.const(int(step), "int32"), tir.const(0, "int32"))
        with T.If(thread < count), T.Then():
            T.buffer_store(self.centroids, value.astype("float32") * f32(float(self.book.scale)), [thread])


class CodeRow:
    """The codes and gains of one vector, as a lane holds them."""

    def __init__(self, rows: CodeRows, lane: Expr) -> None:
        self.rows, self.lanes, self.lane = rows, rows.lanes, lane
        self.words_per_chunk = self.lanes.access * (2 if rows.shape.bits == 16 else 1) // 4
        self.words = Registers(self.lanes.chunks * self.words_per_chunk)
        self.words.fill(u32(0))
        gains = {"lloyd": 1, "linear": self.lanes.chunks}.get(rows.shape.codebook, 0)
        self.gains = Registers(max(1, gains), "uint16")
        self.gains.fill(tir.const(0, "uint16"))

    def load(self, codes: Any, gain: Any, row: Expr, how: str) -> None:
        """Read a vector; for ``how`` see ``cuda_ops.load_words``."""
        for chunk in range(self.lanes.chunks):
            self.lanes.when_active(
                self.lane, chunk, lambda chunk=chunk: self._load_chunk(codes, gain, row, chunk, how)
            )
        if self.rows.book is not None:
            self._load_gain(0, gain, [row, 0], how)

    def _load_chunk(self, codes: Any, gain: Any, row: Expr, chunk: int, how: str) -> None:
        dim, count = self.lanes.dim(self.lane, chunk * self.lanes.access), self.words_per_chunk
        load_words(self.words, chunk * count, codes, [row, dim], count, how)
        if self.rows.shape.codebook == "linear":
            self._load_gain(chunk, gain, [row, dim // LINEAR_BLOCK], how)

    def _load_gain(self, number: int, gain: Any, index: list[Expr], how: str) -> None:
        ptx(f"ld.{how}.b16", self.gains[number], gain.ptr_to(index))

    def _gain(self, number: int) -> Expr:
        return scalar(tir.reinterpret("float16", self.gains[number]).astype("float32"), "float32")

    def values(self) -> Registers:
        """The elements, still rotated if the format rotates; 0 in idle lanes."""
        x = Registers(self.lanes.elements, "float32")
        decode = {"lloyd": self._centroids, "linear": self._linear}.get(self.rows.shape.codebook, self._halves)
        decode(x)
        return x

    def _centroids(self, x: Registers) -> None:
        factor, last = self._gain(0), 2**self.rows.shape.bits - 1
        for r in range(x.count):
            code = (self.words[r // 4] >> u32(r % 4 * 8) & u32(last)).astype("int32")
            x[r] = self.lanes.where_active(self.lane, r, self.rows.centroids[code] * factor)

    def _linear(self, x: Registers) -> None:
        signed = self.rows.shape.bits == 8
        scales = [self._gain(chunk) for chunk in range(self.lanes.chunks)]
        zero = 2.0**23 + (128 if signed else NIBBLE_ZERO)
        for r in range(x.count):
            word = self.words[r // 4]
            word = scalar(word ^ u32(_SIGN_BITS)) if signed else word
            number = float_of(prmt(word, u32(_BYTE_FLOAT), u32(0x7440 + r % 4))) - f32(zero)
            x[r] = number * scales[r // self.lanes.access]

    def _halves(self, x: Registers) -> None:
        for k, word in enumerate(self.words):
            if self.rows.shape.codebook == "half":
                x[2 * k], x[2 * k + 1] = half2(word)
            else:
                x[2 * k], x[2 * k + 1] = float_of(word << u32(16)), float_of(word & u32(0xFFFF0000))


def code_rows(shape: CodecShape, elements: int) -> CodeRows | None:
    """Plan how a format's vectors are read, about ``elements`` elements to a lane; None for those unknown."""
    if shape.dtype not in ITEM_BYTES:
        return None
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    known = shape.codebook in ("lloyd", "linear", "half", "bfloat16")
    return CodeRows(shape, lanes) if known and HeldRotation.possible(lanes, shape.structure) else None
