"""Vectors that a warp holds in formats without a rotation, on CUDA: linear codes in blocks of 32, and 16 bits.

They take the steps of ``vector_core_cuda.VectorCore`` and have its methods. A block of 32 elements lies in one chunk of
neighbouring lanes; its scale is found by exchanges among these. Codes are the low bits of a float32 sum with 1.5·2²³,
whose distance from its neighbours is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import LINEAR_BLOCK, NIBBLE_ZERO
from rotquant_tvm.formats.linear import LINEAR_LIMIT
from rotquant_tvm.ops.codec_shape import CodecShape

from .cuda_ops import Registers, bits_of, f32, float_of, pack_half2, prmt, scalar, shuffle_xor, u32
from .vector_lanes_cuda import VectorLanes, clip_to_half

Expr = Any
_NEXT_TO_ONE = 1.5 * 2.0**23
"""From here on float32 numbers are 1 apart, in both directions for long."""


@dataclass(frozen=True)
class LinearVector:
    """One encoded vector: its numbers before the scale (float32 integers), and the scale of each chunk's block."""

    values: Registers
    scales: Sequence[Expr]


class LinearCore:
    """q8_0 and q4_0."""

    registers = resident = 0
    """See ``VectorCore``."""

    def __init__(self, shape: CodecShape, lanes: VectorLanes) -> None:
        self.shape, self.lanes = shape, lanes
        self.lane: Expr = None
        self.group: Expr = None

    @staticmethod
    def possible(shape: CodecShape, lanes: VectorLanes) -> bool:
        """Whether a format is linear, and its blocks lie in one chunk each."""
        return shape.codebook == "linear" and lanes.lanes * lanes.access >= LINEAR_BLOCK

    def place(self, thread: Expr) -> None:
        """Compute ``lane`` and ``group``."""
        self.lane, self.group = self.lanes.place(thread)

    def load(self, rotation: Any, thread: Expr, warps: int, inverse: Any = None) -> None:
        """There is nothing to read."""

    def encode(self, vectors: Sequence[Registers], then: Callable[[], None] | None = None) -> list[LinearVector]:
        """Encode vectors of float32 registers, which are clipped in place; ``then`` emits something after it."""
        encoded = [self._encode(x) for x in vectors]
        if then is not None:
            then()
        return encoded

    def _encode(self, x: Registers) -> LinearVector:
        values, scales = Registers(x.count, "float32"), []
        for chunk in range(self.lanes.chunks):
            registers = range(chunk * self.lanes.access, (chunk + 1) * self.lanes.access)
            for r in registers:
                x[r] = clip_to_half(x[r])
            scale = scalar(self._scale([x[r] for r in registers]).astype("float16").astype("float32"))
            inverse = scalar(tir.Select(scale != f32(0), f32(1) / scale, f32(0)))
            for r in registers:
                values[r] = self._number(x[r] * inverse)
            scales.append(scale)
        return LinearVector(values, scales)

    def _scale(self, x: Sequence[Expr]) -> Expr:
        """The scale of the lane's block, from the lane's part of it."""
        largest = scalar(self._larger(x[0], x[1:]))
        mask = 1
        while mask * self.lanes.access < LINEAR_BLOCK:
            other = shuffle_xor(largest, mask)
            if self.shape.bits == 8:
                largest = scalar(tir.max(largest, other))
            else:  # of equal ones the first counts, and that of a lane before is
                before = tir.Select(self.lane // mask % 2 == 1, tir.abs(other) >= tir.abs(largest), False)
                beyond = tir.Or(tir.abs(other) > tir.abs(largest), before)
                largest = scalar(tir.Select(beyond, other, largest))
            mask *= 2
        return largest * f32(1 / LINEAR_LIMIT) if self.shape.bits == 8 else largest * f32(-1 / NIBBLE_ZERO)

    def _larger(self, first: Expr, rest: Sequence[Expr]) -> Expr:
        if self.shape.bits == 8:
            largest = tir.abs(first)
            for value in rest:
                largest = tir.max(largest, tir.abs(value))
            return largest
        largest = scalar(first)
        for value in rest:
            largest = scalar(tir.Select(tir.abs(value) > tir.abs(largest), value, largest))
        return largest

    def _number(self, ratio: Expr) -> Expr:
        if self.shape.bits == 8:
            return scalar(tir.nearbyint(tir.max(tir.min(ratio, f32(LINEAR_LIMIT)), f32(-LINEAR_LIMIT))))
        code = tir.floor(ratio + f32(NIBBLE_ZERO + 0.5))
        return scalar(tir.max(tir.min(code, f32(15)), f32(0)) - f32(NIBBLE_ZERO))

    def code_words(self, vector: LinearVector) -> list[list[Expr]]:
        """The words of codes of each chunk."""
        zero = 0 if self.shape.bits == 8 else NIBBLE_ZERO
        numbers = [scalar(bits_of(value + f32(_NEXT_TO_ONE + zero))) for value in vector.values]
        return self.lanes.byte_words(numbers)

    def store_gains(self, vector: LinearVector, gain: Any, row: Expr) -> None:
        """Store the scales, each from the first lane of its block."""
        for chunk, scale in enumerate(vector.scales):
            dim = self.lanes.dim(self.lane, chunk * self.lanes.access)
            first = tir.all(dim % LINEAR_BLOCK == 0, dim < self.lanes.head_dim)
            with T.If(first), T.Then():
                T.buffer_store(gain, scale.astype("float16"), [row, dim // LINEAR_BLOCK])

    def decode(self, vectors: Sequence[LinearVector]) -> list[Registers]:
        """The vectors that encoded ones stand for."""
        results = []
        for vector in vectors:
            y = Registers(self.lanes.elements, "float32")
            for r, value in enumerate(vector.values):
                y[r] = value * vector.scales[r // self.lanes.access]
            results.append(y)
        return results


class HalfCore:
    """f16 and bf16: an encoded vector is its registers."""

    registers = resident = 0
    """See ``VectorCore``."""

    def __init__(self, shape: CodecShape, lanes: VectorLanes) -> None:
        self.shape, self.lanes = shape, lanes
        self.lane: Expr = None
        self.group: Expr = None

    @staticmethod
    def possible(shape: CodecShape, _lanes: VectorLanes) -> bool:
        """Whether a format has 16 bits."""
        return shape.codebook in ("half", "bfloat16")

    def place(self, thread: Expr) -> None:
        """Compute ``lane`` and ``group``."""
        self.lane, self.group = self.lanes.place(thread)

    def load(self, rotation: Any, thread: Expr, warps: int, inverse: Any = None) -> None:
        """There is nothing to read."""

    def encode(self, vectors: Sequence[Registers], then: Callable[[], None] | None = None) -> list[Registers]:
        """Clip vectors of float32 registers and round them, in place; ``then`` emits something after it."""
        for x in vectors:
            for r in range(x.count):
                value = scalar(clip_to_half(x[r]))
                if self.shape.codebook == "half":
                    x[r] = value.astype("float16").astype("float32")
                else:
                    x[r] = float_of(_round_bfloat16(bits_of(value)))
        if then is not None:
            then()
        return list(vectors)

    def code_words(self, x: Registers) -> list[list[Expr]]:
        """The words of codes of each chunk."""
        words = []
        for r in range(0, x.count, 2):
            if self.shape.codebook == "half":
                words.append(pack_half2(x[r], x[r + 1]))
            else:
                words.append(prmt(bits_of(x[r]), bits_of(x[r + 1]), u32(0x7632)))
        each = self.lanes.access // 2
        return [words[each * chunk : each * (chunk + 1)] for chunk in range(self.lanes.chunks)]

    def store_gains(self, x: Registers, gain: Any, row: Expr) -> None:
        """There are none."""

    def decode(self, vectors: Sequence[Registers]) -> list[Registers]:
        """The vectors that encoded ones stand for."""
        return list(vectors)


def _round_bfloat16(bits: Expr) -> Expr:
    """The bits of a float32 rounded to bfloat16, to even."""
    rounded = bits + u32(0x7FFF) + (bits >> u32(16) & u32(1))
    return rounded & u32(0xFFFF0000)
