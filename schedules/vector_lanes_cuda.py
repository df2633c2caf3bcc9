"""Where a warp holds plain vectors on CUDA: a vector lies over a power of two of lanes, in accesses of 16 bytes.

With a = 16 / itemsize elements to an access, register r of a lane holds the dim

    ((r // a) · lanes + lane) · a + r % a

so that neighbouring lanes access neighbouring 16 bytes. Where head_dim is not lanes · a · chunks, the lanes that are
left over in the last chunk are idle: they hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats.gains import HALF_MAX

from .cuda_ops import (
    FULL_MASK,
    WARP,
    Registers,
    any_lane,
    bits_of,
    f32,
    float_of,
    half2,
    load_words,
    pack_half2,
    prmt,
    ptx,
    scalar,
    shuffle_xor,
    store_words,
    u32,
)

Expr = Any
ACCESS_BYTES = 16
READ, WRITE = "global.nc", "global"
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""The dtypes that vectors may have."""


@dataclass(frozen=True)
class VectorLanes:
    """The placement of vectors ``dtype`` (``ITEM_BYTES``) [head_dim] over ``lanes`` lanes each."""

    head_dim: int
    dtype: str
    lanes: int

    @classmethod
    def choose(cls, head_dim: int, dtype: str, elements: int = 8) -> VectorLanes:
        """Take about ``elements`` elements to a lane (at least an access), few idle lanes, and many lanes otherwise."""
        access = cls(head_dim, dtype, 1).access
        accesses = head_dim // access

        def cost(lanes: int) -> tuple[float, int]:
            chunks = -(-accesses // lanes)
            excess = max(chunks * access / elements, elements / (chunks * access))
            return excess * chunks * lanes / accesses, -lanes

        return cls(head_dim, dtype, min((2**k for k in range(6)), key=cost))

    @property
    def access(self) -> int:
        """Elements to an access."""
        return ACCESS_BYTES // ITEM_BYTES[self.dtype]

    @property
    def chunks(self) -> int:
        """Accesses to a lane and vector."""
        return -(-self.head_dim // (self.access * self.lanes))

    @property
    def elements(self) -> int:
        """Registers to a lane and vector."""
        return self.chunks * self.access

    @property
    def groups(self) -> int:
        """Vectors that a warp holds side by side."""
        return WARP // self.lanes

    @property
    def words(self) -> int:
        """32-bit words to an access: always four."""
        return ACCESS_BYTES // 4

    def dim(self, lane: Expr, register: int) -> Expr:
        """The dim in a register of lane ``lane`` (of those of a vector); head_dim or more in an idle lane."""
        chunk, element = divmod(register, self.access)
        return (lane + chunk * self.lanes) * self.access + element

    def idle(self, chunk: int) -> bool:
        """Whether a chunk has idle lanes."""
        return (chunk + 1) * self.lanes * self.access > self.head_dim

    def active(self, lane: Expr, chunk: int) -> Expr:
        """Whether a lane holds dims in a chunk."""
        return self.dim(lane, chunk * self.access) < self.head_dim

    def where_active(self, lane: Expr, register: int, value: Expr) -> Expr:
        """``value``, and 0 in lanes that are idle in a register's chunk."""
        if not self.idle(register // self.access):
            return value
        zero = tir.const(0, str(value.ty.dtype))
        return tir.Select(self.active(lane, register // self.access), value, zero)

    def when_active(self, lane: Expr, chunk: int, emit: Callable[[], None]) -> None:
        """Emit something for the lanes that hold dims in a chunk."""
        if not self.idle(chunk):
            emit()
            return
        with T.If(self.active(lane, chunk)), T.Then():
            emit()

    def place(self, thread: Expr) -> tuple[Expr, Expr]:
        """A thread's number in its vector, and its vector's among those side by side in the warp."""
        return scalar(thread % self.lanes), scalar(thread % WARP // self.lanes)

    # Access

    def raw(self) -> Registers:
        """Registers for a vector as it lies in memory; zeros at first, which idle lanes keep."""
        registers = Registers(self.chunks * self.words)
        registers.fill(tir.const(0, "uint32"))
        return registers

    def load(self, raw: Registers, buffer: Any, index: Sequence[Expr], lane: Expr, how: str = READ) -> None:
        """Load a vector; ``index`` is that of the vector, without its last axis."""
        for chunk in range(self.chunks):
            at = [*index, self.dim(lane, chunk * self.access)]
            self.when_active(lane, chunk, lambda c=chunk, at=at: load_words(raw, c * self.words, buffer, at, 4, how))

    def unpack(self, raw: Registers) -> Registers:
        """The elements of a loaded vector as float32."""
        x = Registers(self.elements, "float32")
        for word in range(raw.count):
            if self.dtype == "float32":
                x[word] = float_of(raw[word])
            elif self.dtype == "float16":
                x[2 * word], x[2 * word + 1] = half2(raw[word])
            else:
                x[2 * word] = float_of(raw[word] << u32(16))
                x[2 * word + 1] = float_of(raw[word] & u32(0xFFFF0000))
        return x

    def store(self, x: Sequence[Expr], buffer: Any, index: Sequence[Expr], lane: Expr, how: str = WRITE) -> None:
        """Store a vector of float32 values in the dtype."""
        words = list(x)
        if self.dtype != "float32":
            pack = pack_half2 if self.dtype == "float16" else _pack_brain2
            words = [pack(*x[k : k + 2]) for k in range(0, self.elements, 2)]
        for chunk in range(self.chunks):
            part = words[chunk * self.words : (chunk + 1) * self.words]
            at = [*index, self.dim(lane, chunk * self.access)]
            self.when_active(lane, chunk, lambda part=part, at=at: store_words(buffer, at, part, how))

    def byte_words(self, values: Sequence[Expr]) -> list[list[Expr]]:
        """The low bytes of the registers' words, four to a word, for each chunk."""
        words = []
        for k in range(0, self.elements, 4):
            low, high = (prmt(values[j], values[j + 1], u32(0x0040)) for j in (k, k + 2))
            words.append(prmt(low, high, u32(0x5410)))
        each = self.access // 4
        return [words[each * chunk : each * (chunk + 1)] for chunk in range(self.chunks)]

    def store_codes(self, words: Sequence[Sequence[Expr]], codes: Any, row: Expr, lane: Expr, how: str) -> None:
        """Store the words of codes of each chunk, one access to a chunk; codes of 1 or 2 bytes [rows, head_dim]."""
        for chunk, part in enumerate(words):
            at = [row, self.dim(lane, chunk * self.access)]
            self.when_active(lane, chunk, lambda part=part, at=at: store_words(codes, at, part, how))

    # Between the lanes of a vector

    def from_lane(self, value: Expr, lane: Expr) -> Expr:
        """The value of another lane of the same vector, ``lane`` counted within it."""
        cell = Registers(1, str(value.ty.dtype))
        segment = (WARP - self.lanes) << 8 | WARP - 1
        ptx("shfl_sync.idx.b32", cell[0], value, u32(lane), u32(segment), u32(FULL_MASK))
        return cell[0]

    def sum(self, values: Sequence[Expr]) -> list[Expr]:
        """Sums of the lanes' values, known to every lane of a vector; several at once hide each other's latency."""
        masks = [self.lanes >> k for k in range(1, self.lanes.bit_length())]
        values = [scalar(value) for value in values]
        for mask in masks:
            others = [shuffle_xor(value, mask) for value in values]
            values = [scalar(value + other) for value, other in zip(values, others, strict=True)]
        return values

    def square_norms(self, vectors: Sequence[Registers]) -> list[Registers]:
        """The squared norms, after replacing NaN by 0 and clipping to the finite float16 range where there is need.

        A norm within that range proves that there is none, so that vectors are looked through again only if some norm
        of the warp is beyond.
        """
        totals = [Registers(1, "float32") for _ in vectors]

        def emit() -> None:
            partial = [_square_sum(x) for x in vectors]
            for total, value in zip(totals, self.sum(partial), strict=True):
                total[0] = value

        emit()
        # By their bits, which are ordered as positive numbers are, and those of NaN beyond.
        largest = int(np.float32(HALF_MAX**2).view(np.uint32))
        with T.If(any_lane(tir.any(*(bits_of(total[0]) > u32(largest) for total in totals)))), T.Then():
            for x in vectors:
                for r in range(x.count):
                    x[r] = clip_to_half(x[r])
            emit()
        return totals


def clip_to_half(value: Expr) -> Expr:
    """NaN becomes 0, and everything else is clipped to the finite float16 range."""
    clipped = tir.max(tir.min(value, f32(HALF_MAX)), f32(-HALF_MAX))
    number = bits_of(value) & u32(0x7FFFFFFF) <= u32(0x7F800000)
    return tir.Select(number, clipped, f32(0))


def _pack_brain2(low: Expr, high: Expr) -> Expr:
    """Two float32 as a word of two bfloat16, ``low`` first."""
    cell = Registers(1)
    ptx("cvt.rn.bf16x2.f32", cell[0], high, low)
    return cell[0]


def _square_sum(x: Registers) -> Expr:
    """The lane's share; two sums, since one would wait for itself."""
    sums = Registers(2, "float32")
    for half in range(2):
        sums[half] = x[half] * x[half]
    for r in range(2, x.count):
        sums[r % 2] = sums[r % 2] + x[r] * x[r]
    return sums[0] + sums[1]
