"""The arithmetic of vectors that a warp holds, on CUDA: norm, rotation, codes, gain, and back.

What quantize, roundtrip and append have in common. A kernel plans a ``VectorCore``, calls ``load`` once (weights of the
rotation into registers, tables into shared memory), and then ``encode`` for as many vectors as it likes::

    lanes = VectorLanes.choose(head_dim, dtype)
    core = VectorCore(codec_shape, lanes, codes=True)
    core.place(thread)
    raw = lanes.raw()
    lanes.load(raw, x, [row], core.lane)              # idle lanes keep zeros
    core.load(rotation, thread, warps)                # all threads of the block
    (encoded,) = core.encode([lanes.unpack(raw)])
    encoded.values[r]                                 # code | grid value as float16 << 16; of lanes.dim(core.lane, r)
    encoded.gain                                      # float32, already rounded to float16; the same in all lanes

Arithmetic is float32 and follows the definitions of ``ops.vector_code`` up to the order of sums. Instructions that one
element takes at float16, head_dim 128, quartets at stride 1, eight elements to a lane: conversion 1, norm 1 and its
sum over lanes 1, rotation 4, code 3 or 4, gain 2 (products, and sums over lanes), inverse rotation 4, scaling 1,
packing 1/2, access and addresses 1/2, and what is done once per vector 4: about 24. An H100 has 132 · 4 schedulers that
issue a warp's instruction each cycle: at 1.7 GHz and 3 TB/s they have 38 for every element that is read and written as
float16 (77 as float32). Comparisons, selections and bitwise instructions count double; shuffles and shared memory
have 9.6 accesses without bank conflicts, and the table's random places conflict about 3.5 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codebook
from rotquant_tvm.formats.gains import HALF_MAX, IP_FLOOR
from rotquant_tvm.ops.codec_shape import CodecShape

from .code_exchange_cuda import CodeExchange
from .code_lookup_cuda import CodeLookup
from .cuda_ops import WARP, Registers, block_sync, f32, ptx, scalar
from .exchanged_rotation_cuda import ExchangedRotation
from .held_rotation_cuda import REGISTER_WEIGHTS, HeldRotation, default_budget, load_rotations
from .vector_lanes_cuda import VectorLanes

Expr = Any
TABLE_BITS = 3
"""From how many bits on a table is less work than steps."""


@dataclass(frozen=True)
class EncodedVector:
    """One vector of a warp, encoded.

    values  per register, see ``CodeLookup``; 0 in idle lanes.
    gain    float32, the value of the float16 gain.
    """

    values: Registers
    gain: Expr


class VectorCore:
    """Encodes and decodes vectors; ``possible`` says for which formats."""

    def __init__(
        self,
        shape: CodecShape,
        lanes: VectorLanes,
        *,
        codes: bool,
        table: bool | None = None,
        weights: int | None = REGISTER_WEIGHTS,
        staged: bool = False,
        exchange: bool = False,
    ) -> None:
        """Plan for a format.

        ``codes`` and ``table`` are those of ``CodeLookup`` (None: as many bits suggest), ``weights`` the budget of the
        rotation (None: its default), ``staged`` that of ``HeldRotation``. ``exchange``: whether elements may be in any
        order between ``encode`` and ``decode`` (``exchanged_rotation_cuda``), if the rotation has several layers.
        """
        self.shape, self.lanes = shape, lanes
        book = Codebook(shape.bits, shape.head_dim)
        self.lookup = CodeLookup(book, codes=codes, table=shape.bits >= TABLE_BITS if table is None else table)
        self.scale = float(book.scale)
        several = len(shape.structure) > 1
        self.exchanged: ExchangedRotation | None = None
        if exchange and several and ExchangedRotation.possible(lanes, shape.structure):
            self.exchanged = ExchangedRotation(lanes, shape.structure, budget=weights)
        budget = default_budget(shape.structure) if weights is None else weights
        self.rotation = HeldRotation(lanes, shape.structure, budget=budget, staged=staged)
        self.inverse = self.rotation.inverse(budget)
        self.lane: Expr = None
        self.group: Expr = None

    @staticmethod
    def possible(shape: CodecShape, lanes: VectorLanes) -> bool:
        """Whether a format has a plain codebook and a rotation of small blocks."""
        return shape.codebook == "lloyd" and HeldRotation.possible(lanes, shape.structure)

    @property
    def registers(self) -> int:
        """How many registers a lane keeps throughout: those of weights."""
        if self.exchanged is not None:
            return self.exchanged.register_weights
        return self.rotation.register_weights() + self.inverse.register_weights()

    @property
    def resident(self) -> int:
        """How many blocks the compiler is to fit into a multiprocessor; 0 for as many as come."""
        return 0 if self.exchanged is None else self.exchanged.resident

    def place(self, thread: Expr) -> None:
        """Compute ``lane``, the thread's number in its vector, and ``group``, its vector's among those of the warp."""
        self.lane, self.group = self.lanes.place(thread)

    def load(self, rotation: Any, thread: Expr, warps: int, inverse: Any = None) -> None:
        """Read the rotation's weights, those of its inverse if its coefficients are given, and fill the table.

        To be called by all threads of the block, which it waits for; after ``place``.
        """
        self.lookup.load(thread, warps * WARP)
        if self.exchanged is not None:
            self.exchanged.load(rotation, self.lane, thread, warps)
            return
        self.rotation.place(self.lane)
        self.inverse.place(self.lane)
        parts = [(self.rotation, rotation)] + ([] if inverse is None else [(self.inverse, inverse)])
        if load_rotations(parts, thread, warps):
            block_sync()

    def encode(self, vectors: Sequence[Registers], then: Callable[[], None] | None = None) -> list[EncodedVector]:
        """Encode vectors of float32 registers, which are clipped in place where they are beyond float16.

        ``then`` emits something as soon as the vectors' registers are free.
        """
        squares = self.lanes.square_norms(vectors)
        inverses, norms = [], []
        for square in squares:
            root = Registers(1, "float32")
            ptx("rsqrt.approx.ftz.f32", root[0], square[0])
            some = square[0] >= f32(2.0**-126)
            inverses.append(scalar(tir.Select(some, root[0], f32(0))))
            norms.append(scalar(square[0] * inverses[-1]))
        rotated = (self.exchanged or self.rotation).apply(vectors)
        if then is not None:
            then()
        values = self.lookup.select(rotated, norms, inverses)
        for value in values:
            for r in range(value.count):
                if self.lanes.idle(r // self.lanes.access):
                    value[r] = self.lanes.where_active(self.lane, r, value[r])
        gains = self._gains(rotated, values, norms)
        return [EncodedVector(value, gain) for value, gain in zip(values, gains, strict=True)]

    def _gains(self, rotated: Sequence[Registers], values: Sequence[Registers], norms: Sequence[Expr]) -> list[Expr]:
        rule, partial = self.shape.gain, []
        for y, value in zip(rotated, values, strict=True):
            grid = [scalar(self.lookup.grid_value(value[r])) for r in range(value.count)]
            if rule in ("mse", "ip"):
                partial.append(_products(y, grid))
            if rule in ("norm", "mse"):
                partial.append(_products(grid, grid))
        sums = self.lanes.sum(partial)
        each = len(sums) // len(norms)
        return [self._gain(norm, sums[each * k : each * (k + 1)]) for k, norm in enumerate(norms)]

    def _gain(self, norm: Expr, sums: Sequence[Expr]) -> Expr:
        """The gain by rule (``formats.gains``), from sums in steps of the grid."""
        rule, scale = self.shape.gain, self.scale
        if rule == "raw":
            gain = norm
        elif rule == "norm":
            root = Registers(1, "float32")
            ptx("rsqrt.approx.ftz.f32", root[0], sums[0])
            gain = norm * root[0] * f32(1 / scale)
        elif rule == "mse":
            gain = tir.Select(norm > f32(0), sums[0] / sums[1] * f32(1 / scale), f32(0))
        else:
            inner = sums[0] * f32(scale)
            usable = inner > norm * f32(IP_FLOOR)
            gain = tir.Select(usable, norm / tir.Select(usable, inner, f32(1)) * norm, norm)
        clipped = tir.max(tir.min(gain, f32(HALF_MAX)), f32(0))
        return scalar(clipped.astype("float16").astype("float32"), "float32")

    def code_words(self, vector: EncodedVector) -> list[list[Expr]]:
        """The words of codes, a byte each, of each chunk; of a core with ``codes``."""
        words = self.lanes.byte_words(list(vector.values))
        if self.exchanged is None:
            return words
        ordered = CodeExchange(self.exchanged, self.lane).back([word for part in words for word in part])
        each = len(words[0])
        return [ordered[k : k + each] for k in range(0, len(ordered), each)]

    def store_gains(self, vector: EncodedVector, gain: Any, row: Expr) -> None:
        """Store the gain, float16 [rows, 1], from the vector's first lane."""
        with T.If(self.lane == 0), T.Then():
            T.buffer_store(gain, vector.gain.astype("float16"), [row, 0])

    def decode(self, vectors: Sequence[EncodedVector]) -> list[Registers]:
        """The vectors that encoded ones stand for, un-rotated."""
        scaled = []
        for vector in vectors:
            factor = scalar(vector.gain * f32(self.scale))
            registers = Registers(self.lanes.elements, "float32")
            for r, value in enumerate(vector.values):
                registers[r] = self.lookup.grid_value(value) * factor
            scaled.append(registers)
        if self.exchanged is not None:
            return self.exchanged.apply_inverse(scaled)
        return self.rotation.apply_inverse(scaled, self.inverse)


def _products(a: Sequence[Expr] | Registers, b: Sequence[Expr] | Registers) -> Expr:
    """The lane's share of an inner product, in two sums."""
    pairs = list(zip(a, b, strict=True))
    sums = Registers(2, "float32")
    for r, (left, right) in enumerate(pairs):
        sums[r % 2] = left * right if r < 2 else sums[r % 2] + left * right
    return sums[0] + sums[1]
