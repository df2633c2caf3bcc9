"""Quantizing half a tile in the order of a tile's lanes, on CUDA: from rotated values to codes and gains.

Arithmetic that others do by comparisons and selections is done by multiply-adds here, of which a GPU has twice as many:
a *step*, min(1, max(0, y - b)) of values scaled up so far that any difference is over 1, is 1 above a boundary and 0
below, boundaries and centroids are polynomials of the steps before them, and codes are summed up in the lowest bits of
a float32 (2^23 + code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import HALF_MAX, LINEAR_BLOCK, NIBBLE_ZERO, Codebook, Codec
from rotquant_tvm.formats.linear import LINEAR_LIMIT
from rotquant_tvm.ops.vector_code import corrected_gain

from .cuda_ops import Registers, any_lane, bits_of, f32, pack_half2, prmt, ptx, scalar, shuffle_xor, u32
from .stepped_table_cuda import SteppedTable, fma
from .tile_lane_cuda import Lane
from .tile_pack_cuda import EVERY_NIBBLE
from .tile_rows_cuda import pack_brain2

Expr = Any
INTEGER = 2.0**23
"""A float32 of this size holds an integer in its lowest bits."""
SCALE = 2.0**64
"""Vectors are brought to this norm: values that differ then differ by more than 1."""
HUGE = 2.0**127
ELEMENTS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(a, u) of a group's four elements."""


@dataclass(frozen=True)
class HalfTileCodes:
    """What a lane has of half a tile.

    groups  its words in order: one to a group, two at 8 bits, four at 16.
    gains   [row][slot], float16 bits as uint32, known to all lanes that share the token.
    own     instead of these, the only gain of the lane's own slot (``Lane.own``).
    """

    groups: list[Expr]
    gains: list[list[Expr]]
    own: Expr | None = None


@dataclass(frozen=True)
class Guard:
    """``repair`` brings values into the finite float16 range; a squared norm up to ``proof`` says that they are."""

    proof: float
    repair: Callable[[], None]


def beyond(value: Expr, limit: float) -> Expr:
    """Whether a float32 is larger than ``limit`` either way, or NaN: as integers, since a compiler turns ≤ around."""
    return bits_of(value) & u32(0x7FFFFFFF) > u32(int(np.float32(limit).view(np.uint32)))


def supported(codec: Codec) -> bool:
    """Whether there is a way to quantize to this format here."""
    return codec.format.codebook in ("lloyd", "linear", "half", "bfloat16")


def encode_half_tile(codec: Codec, order: Lane, y: Registers, guard: Guard | None) -> HalfTileCodes:
    """Quantize the values y[(k·2 + a)·4 + r·2 + u] of a lane (``Lane``), rotated already.

    Without a guard all of them are in the finite float16 range.
    """
    kind = codec.format.codebook
    if kind == "lloyd":
        return _CodebookEncoder(codec, order, y).run(guard)
    if guard is not None:
        with T.If(any_lane(tir.any(*(beyond(value, HALF_MAX) for value in y)))), T.Then():
            guard.repair()
    if kind == "linear":
        return (_bytes if codec.format.bits == 8 else _nibbles)(order, y)
    pack = pack_half2 if kind == "half" else pack_brain2
    words = []
    for number in range(2 * order.blocks):
        k, r = order.place(number)
        words += [pack(y[_at(k, a, r, 0)], y[_at(k, a, r, 1)]) for a in range(2)]
    return HalfTileCodes(words, [])


def _at(k: int, a: int, r: int, u: int) -> int:
    return (k * 2 + a) * 4 + r * 2 + u


def _step(value: Expr, boundary: Expr) -> Expr:
    """1 where |value| > boundary, else 0; ``boundary`` comes negated."""
    cell = Registers(1, "float32")
    ptx("add.ftz.sat.f32", cell[0], tir.abs(value), f32(boundary))
    return cell[0]


def share(values: Sequence[Expr], order: Lane, combine: Callable[[Expr, Expr], Expr]) -> list[Expr]:
    """Combine values over the lanes that share tokens; several at once hide each other's latency."""
    for mask in order.sharers:
        others = [shuffle_xor(value, mask) for value in values]
        values = [scalar(combine(value, other)) for value, other in zip(values, others, strict=True)]
    return list(values)


def half_bits(value: Expr) -> Expr:
    """A float16 as the low half of a word."""
    return scalar(tir.reinterpret("uint16", value).astype("uint32"))


class _CodebookEncoder:
    """Codes of a codebook that is antisymmetric: a sign, and a magnitude of bits - 1 steps."""

    def __init__(self, codec: Codec, order: Lane, y: Registers) -> None:
        book = codec.codebook
        assert isinstance(book, Codebook)
        self.codec, self.order, self.y, self.bits = codec, order, y, codec.format.bits
        levels = 1 << self.bits - 1
        boundaries = [-SCALE * float(b) for b in book.boundaries[levels:]]
        self.centroids = SteppedTable([float(c) for c in book.centroids[levels:]])
        # The step of level n parts each of the 2^n ranges that the steps before it leave.
        spans = [levels >> n + 1 for n in range(self.bits - 1)]
        self.boundaries = [SteppedTable(boundaries[span - 1 :: 2 * span]) for span in spans]
        rule = codec.format.gain
        self.wants_inner, self.wants_square = rule in ("mse", "ip"), rule in ("mse", "norm") and self.bits > 1
        self.known_square = codec.head_dim * float(book.centroids[-1]) ** 2 if self.bits == 1 else 1.0

    def run(self, guard: Guard | None) -> HalfTileCodes:
        order, slots = self.order, range(self.order.slots)
        squares = Registers(order.slots, "float32")
        self._measure(squares)
        if guard is not None:
            with T.If(any_lane(tir.any(*(beyond(square, guard.proof) for square in squares)))), T.Then():
                guard.repair()
                self._measure(squares)
        self.norms = [scalar(tir.sqrt(square)) for square in squares]
        some = [norm > f32(0) for norm in self.norms]
        self.factors = [
            scalar(tir.Select(yes, f32(SCALE) / tir.Select(yes, n, f32(1)), f32(0)))
            for yes, n in zip(some, self.norms, strict=True)
        ]
        self.lifts = [scalar(tir.Select(yes, f32(0), f32(1))) for yes in some]
        self.inner, self.square = (Registers(len(slots), "float32") for _ in range(2))
        self.inner.fill(f32(0))
        self.square.fill(f32(0))
        halves = [self._half(*order.place(number)) for number in range(2 * order.blocks)]
        groups = [self._group(*pair) for pair in zip(halves[::2], halves[1::2], strict=True)]
        return HalfTileCodes(groups, [self._gains()])

    def _measure(self, squares: Registers) -> None:
        """The squared norms; more sums than slots, since one would wait for itself."""
        slots, chains = self.order.slots, 4 // self.order.slots
        sums = Registers(4, "float32")
        sums.fill(f32(0))
        for k in range(self.order.blocks):
            for a, u in ELEMENTS:
                for r in range(2):
                    at, value = self.order.slot(a, r, u) * chains + k % chains, self.y[_at(k, a, r, u)]
                    sums[at] = sums[at] + value * value
        shares = [sums[slot * 2] + sums[slot * 2 + 1] if chains == 2 else sums[slot] for slot in range(slots)]
        for slot, total in enumerate(share([scalar(part) for part in shares], self.order, lambda p, q: p + q)):
            squares[slot] = total

    def _half(self, k: int, r: int) -> Expr:
        """2^23 + the codes of four elements, a nibble each; those of negative ones complemented below the sign."""
        total: Expr = f32(INTEGER)
        top = self.bits - 1
        for a, u in ELEMENTS:
            slot, value, nibble = self.order.slot(a, r, u), self.y[_at(k, a, r, u)], 16.0 ** (2 * a + u)
            total = fma(fma(value, HUGE, self.lifts[slot], saturate=True), 2.0**top * nibble, total)
            scaled = scalar(value * self.factors[slot])
            steps: list[Expr] = []
            for level, boundary in enumerate(self.boundaries):
                steps.append(_step(scaled, boundary.value(steps)))
                total = fma(steps[-1], 2.0 ** (top - 1 - level) * nibble, total)
            self._add(slot, scaled, self.centroids.value(steps))
        return total

    def _add(self, slot: int, scaled: Expr, centroid: Expr) -> None:
        if self.wants_inner:
            self.inner[slot] = self.inner[slot] + f32(centroid) * tir.abs(scaled)
        if self.wants_square:
            self.square[slot] = self.square[slot] + centroid * centroid

    def _group(self, low: Expr, high: Expr) -> Expr:
        word = prmt(bits_of(low), bits_of(high), u32(0x5410))
        if self.bits == 1:
            return word
        negative = ~(word >> u32(self.bits - 1)) & u32(EVERY_NIBBLE)
        return scalar(word ^ negative * u32((1 << self.bits - 1) - 1))

    def _gains(self) -> list[Expr]:
        wanted = [*(self.inner if self.wants_inner else ()), *(self.square if self.wants_square else ())]
        shared = share(wanted, self.order, lambda p, q: p + q)
        gains = []
        for slot, norm in enumerate(self.norms):
            inner = scalar(shared[slot] * (norm * f32(1 / SCALE))) if self.wants_inner else f32(0)
            square = shared[slot - self.order.slots] if self.wants_square else f32(self.known_square)
            gains.append(half_bits(corrected_gain(self.codec.format.gain, norm, inner, square)))
        return gains


def _linear_blocks(order: Lane) -> list[list[int]]:
    """The 16 dims (k) of each block that has a scale of its own."""
    each = LINEAR_BLOCK // 16
    return [list(range(k, min(k + each, order.blocks))) for k in range(0, order.blocks, each)]


def _elements(order: Lane, block: Sequence[int], slot: int) -> list[tuple[int, int, int, int]]:
    """(k, a, r, u) of a slot's elements in a block."""
    return [(k, a, r, u) for k in block for r in range(2) for a, u in ELEMENTS if order.slot(a, r, u) == slot]


def _largest(order: Lane, y: Registers, block: Sequence[int]) -> list[Expr]:
    """The largest magnitudes of the slots in a block."""
    found = []
    for slot in range(order.slots):
        largest = Registers(1, "float32")
        largest[0] = f32(0)
        for element in _elements(order, block, slot):
            largest[0] = tir.max(largest[0], tir.abs(y[_at(*element)]))
        found.append(largest[0])
    return share(found, order, tir.max)


def _inverse(scale: Expr) -> Expr:
    """1/scale, 0 for 0."""
    some = tir.abs(scale) > f32(0)
    return scalar(tir.Select(some, f32(1) / tir.Select(some, scale, f32(1)), f32(0)))


def _bytes(order: Lane, y: Registers) -> HalfTileCodes:
    """q8_0 (``formats.linear``); adding 1.5·2^23 rounds to the nearest integer, which is then in the lowest bits."""
    gains, inverses = [], []
    for block in _linear_blocks(order):
        scales = [scalar((m / f32(LINEAR_LIMIT)).astype("float16"), "float16") for m in _largest(order, y, block)]
        gains.append([half_bits(scale) for scale in scales])
        inverses += [[_inverse(scale.astype("float32")) for scale in scales]] * len(block)
    words = []
    for number in range(2 * order.blocks):
        k, r = order.place(number)
        codes = []
        for a, u in ELEMENTS:
            ratio = y[_at(k, a, r, u)] * inverses[k][order.slot(a, r, u)]
            ratio = tir.max(tir.min(ratio, f32(LINEAR_LIMIT)), f32(-LINEAR_LIMIT))
            codes.append(bits_of(scalar(ratio + f32(1.5 * INTEGER))))
        low, high = (prmt(codes[n], codes[n + 1], u32(0x0040)) for n in (0, 2))
        words.append(prmt(low, high, u32(0x5410)))
    return HalfTileCodes(words, gains)


def _nibbles(order: Lane, y: Registers) -> HalfTileCodes:
    """q4_0 (``formats.linear``)."""
    gains, inverses = [], []
    for block in _linear_blocks(order):
        scales = []
        for slot, largest in enumerate(_largest(order, y, block)):
            negative = _first_sign(order, y, block, slot, largest)
            signed = tir.Select(negative, f32(0) - largest, largest)
            scales.append(scalar((signed / f32(-NIBBLE_ZERO)).astype("float16"), "float16"))
        gains.append([half_bits(scale) for scale in scales])
        inverses += [[_inverse(scale.astype("float32")) for scale in scales]] * len(block)
    groups = []
    for number in range(2 * order.blocks):
        k, r = order.place(number)
        total: Expr = f32(INTEGER)
        for a, u in ELEMENTS:
            ratio = y[_at(k, a, r, u)] * inverses[k][order.slot(a, r, u)] + f32(NIBBLE_ZERO + 0.5)
            code = Registers(1, "float32")
            ptx("add.rz.ftz.f32", code[0], tir.max(tir.min(ratio, f32(15)), f32(0)), f32(INTEGER))
            total = fma(code[0] - f32(INTEGER), 16.0 ** (2 * a + u), total)
        groups.append(total)
    pairs = zip(groups[::2], groups[1::2], strict=True)
    return HalfTileCodes([prmt(bits_of(low), bits_of(high), u32(0x5410)) for low, high in pairs], gains)


def _first_sign(order: Lane, y: Registers, block: Sequence[int], slot: int, largest: Expr) -> Expr:
    """Whether the first of a block's elements of this magnitude is negative."""
    first = Registers(1, "int32")
    first[0] = 4 * LINEAR_BLOCK
    for k, a, r, u in _elements(order, block, slot):
        value = y[_at(k, a, r, u)]
        place = (order.dim(a, r, u) + 16 * (k - block[0])) * 2 + tir.Select(value < f32(0), 1, 0)
        first[0] = tir.min(first[0], tir.Select(tir.abs(value) == largest, place, 4 * LINEAR_BLOCK))
    for mask in order.sharers:
        first[0] = tir.min(first[0], shuffle_xor(first[0], mask))
    return first[0] % 2 == 1

