"""Quantizing half a tile 16 dims at a time, on CUDA: the norms first, from the rows themselves.

A rotation keeps norms, and tensor cores multiply float16 rows with themselves exactly. Knowing the norms, a warp
rotates 16 dims, quantizes them and forgets them, so that it holds few values at a time.

A code is the integer part of an odd polynomial of the rotated value that is one higher at each boundary: rounded down
by adding 2^23, it stands in the lowest bits of a float32. Its centroid comes from another lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codebook, Codec
from rotquant_tvm.ops.vector_code import corrected_gain

from .cuda_ops import Registers, any_lane, bits_of, f32, i32, prmt, ptx, scalar, shuffle, u32
from .stepped_table_cuda import fma
from .tile_codes_cuda import ELEMENTS, INTEGER, HalfTileCodes, beyond, half_bits, share
from .tile_lane_cuda import Lane
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import HalfTileRows, multiply_eight

Expr = Any
LIFT = 16.0
"""float16 values are rotated to so many times their size: no fifth power of a norm overflows then, nor vanishes."""
MIDDLE = 0.5 + 2.0**-24
"""What 0 is taken to: just over the boundary in the middle, so that rows of zeros get the middle code."""


def code_polynomial(codec: Codec) -> list[float] | None:
    """Coefficients of z, z³, z⁵, …: a polynomial that grows and is i at the codebook's i-th boundary above 0.

    None if the polynomial of so many terms does not do so for all |z| ≤ 1.
    """
    book = codec.codebook
    if codec.format.codebook != "lloyd" or not isinstance(book, Codebook):
        return None
    boundaries = np.array(book.boundaries[len(book.boundaries) // 2 + 1 :], np.float64)
    count = len(boundaries)
    if not count:
        return [1.0]
    odd = 2 * np.arange(count) + 1
    scaled = np.linalg.solve((boundaries[:, None] / boundaries[-1]) ** odd, np.arange(1.0, count + 1))
    z = np.linspace(0, 1.001, 20001)[:, None]
    values = ((z / boundaries[-1]) ** odd * scaled).sum(1)
    below = z[:, 0] <= boundaries[-1]
    grows = (np.diff(values[below]) > 0).all() and (values[~below] > count).all()
    return list(map(float, scaled / boundaries[-1] ** odd)) if grows else None


def has_block_codes(codec: Codec, dtype: str) -> bool:
    """Whether half tiles of this format can be quantized so."""
    return dtype != "float32" and not codec.rotation.identity and code_polynomial(codec) is not None


def matrix_scale(dtype: str) -> float:
    """What the rotation's matrix is multiplied by for rows of this type."""
    return LIFT if dtype == "float16" else 1.0


@dataclass(frozen=True)
class Operands:
    """Rows as a warp holds them.

    words    the tensor cores' operands, four to 16 dims.
    squares  the squared norms of the lane's tokens.
    outside  not 0 if an element is beyond the finite float16 range, None if there can be none.
    """

    words: Registers
    squares: Registers
    outside: Expr | None


class BlockCodes:
    """Emits it for one role. The rotation is prepared with its matrix times ``matrix_scale``.

    The powers of float16 rows' norms are in the polynomial's coefficients; bfloat16 values are brought to norm 1.
    ``some``: a condition that always holds, which a compiler must not know: it would unroll a loop otherwise.
    """

    UNROLLED = 8
    """Up to so many blocks of 16 dims are unrolled, which is 5 % faster; more that need the same inputs take turns."""

    def __init__(self, codec: Codec, rotation: TileRotation, order: Lane, some: Expr) -> None:
        self.codec, self.rotation, self.order = codec, rotation, order
        self.some = some
        self.bits, self.scale = codec.format.bits, rotation.scale
        self.fused = rotation.operand == "f16"
        polynomial = code_polynomial(codec)
        assert polynomial is not None
        self.polynomial = [c / 2**self.bits for c in polynomial]
        rule = codec.format.gain
        self.wants_inner, self.wants_square = rule in ("mse", "ip"), rule in ("mse", "norm") and self.bits > 1
        self.known_square = codec.head_dim * float(codec.codebook.centroids[-1]) ** 2 if self.bits == 1 else 1.0
        self.table = self._table() if self.wants_inner or self.wants_square else None

    def read(self, rows: HalfTileRows) -> Operands:
        """Read the rows. float16 elements beyond the finite range are clipped, bfloat16 ones said to be there."""
        words, squares = Registers(4 * self.order.blocks), Registers(self.order.slots, "float32")
        self._read(rows, words, squares)
        proof = rows.proof
        assert proof is not None
        outside = scalar(any_lane(tir.any(*(beyond(square, proof) for square in squares))).astype("int32"))
        if not self.fused:
            return Operands(words, squares, outside)
        with T.If(outside != 0), T.Then():
            rows.clip_rows()
            self._read(rows, words, squares)
        return Operands(words, squares, None)

    def _read(self, rows: HalfTileRows, words: Registers, squares: Registers) -> None:
        products = [Registers(4, "float32") for _ in range(4)]
        for product in products:
            product.fill(f32(0))
        for k in range(self.order.blocks):
            (operand,) = rows.operands(k, self.order.role == "k")
            for n, word in enumerate(operand):
                words[4 * k + n] = word
            four = [words[4 * k + n] for n in range(4)]
            for n, product in enumerate(products):
                multiply_eight(product, four[n // 2 * 2 : n // 2 * 2 + 2], four[n], rows.operand)
        self._take_diagonals(products, squares)

    def _take_diagonals(self, products: Sequence[Registers], squares: Registers) -> None:
        """Two neighbouring words were multiplied with each of them: so many dims of so many tokens with themselves.

        Lane (g, g / 2) has the sums of token g or g + 8, of word n in the upper half of the product if n is even.
        """
        lane = self.order.lane
        odd = scalar((lane // 4 % 2).astype("int32"))
        parts = [tir.Select(odd == 1, product[n % 2 * 2 + 1], product[n % 2 * 2]) for n, product in enumerate(products)]
        pairs = ((0, 2), (1, 3)) if self.order.role == "k" else ((0, 1), (2, 3))
        found = [scalar(parts[first] + parts[second]) for first, second in pairs]
        for slot in range(self.order.slots):
            if self.order.role == "k":
                squares[slot] = shuffle(found[slot], lane // 4 * 4 + lane // 8)
            else:
                squares[slot] = shuffle(found[slot // 2], lane % 4 * 9 + 4 * (slot % 2))

    def encode(self, operands: Operands) -> HalfTileCodes:
        """Rotate and quantize what ``read`` gave, nothing of which is outside."""
        order = self.order
        self.inverses = [self._inverse(square) for square in operands.squares]
        self.coefficients = [self._coefficients(inverse) for inverse in self.inverses]
        self.inner, self.square = (Registers(order.slots, "float32") for _ in range(2))
        self.inner.fill(f32(0))
        self.square.fill(f32(0))
        groups = self._groups(list(operands.words)) if self.rotation.outer is None else self._quartets(operands)
        if self.fused:
            return HalfTileCodes(groups, [], self._own_gain(list(operands.squares)))
        return HalfTileCodes(groups, [self._gains(list(operands.squares))])

    def _groups(self, words: Sequence[Expr]) -> list[Expr]:
        """The words of all groups; a loop, where there is one, takes fewer registers and less of the code's cache."""
        order, each = self.order, self.rotation.period * (1 + self.rotation.period % 2)
        if order.blocks % each or order.blocks == each or order.blocks <= self.UNROLLED:
            return self._some(words, order.blocks, 0)
        line = Registers(order.blocks)
        line.fill(u32(0))
        with T.serial(0, scalar(tir.Select(self.some, i32(order.blocks // each), i32(0)))) as turn:
            for index in range(order.blocks - each):
                line[index] = line[index + each]
            for index, group in enumerate(self._some(words, each, turn * each)):
                line[order.blocks - each + index] = group
        if order.role == "v":
            return list(line)
        pairs = each // 2
        places = [(turn, r, pair) for r in range(2) for turn in range(order.blocks // each) for pair in range(pairs)]
        return [line[turn * each + r * pairs + pair] for turn, r, pair in places]

    def _quartets(self, operands: Operands) -> list[Expr]:
        """The words of all groups where the rotation's last layer stands apart: four blocks at a time."""
        outer = self.rotation.outer
        assert outer is not None
        words, apart = list(operands.words), outer.stride // 16
        found: dict[tuple[int, int], Expr] = {}
        for first in range(apart):
            places = range(first, self.order.blocks, apart)
            pairs = [self.rotation.sum_and_difference(k, k + apart, words, self.order) for k in places[::2]]
            x = outer.combine(pairs)
            for r in range(2):
                for k, y in zip(places, x, strict=True):
                    found[k, r] = self._half(y, r)
        groups = self._pack(found, self.order.blocks)
        return outer.arrange(groups, outer.some(list(operands.squares)), self.order)

    def _some(self, words: Sequence[Expr], count: int, ahead: Expr) -> list[Expr]:
        """The groups of ``count`` blocks, as if these were all."""
        found: dict[tuple[int, int], Expr] = {}
        for k in range(count):
            y = self.rotation.rotated(k, words, self.order, ahead)
            for r in range(2):
                found[k, r] = self._half(y, r)
        return self._pack(found, count)

    def _pack(self, found: dict[tuple[int, int], Expr], count: int) -> list[Expr]:
        places = [(n % count, n // count) if self.order.role == "k" else divmod(n, 2) for n in range(2 * count)]
        halves = [found[place] for place in places]
        return [prmt(low, high, u32(0x5410)) for low, high in zip(halves[::2], halves[1::2], strict=True)]

    def _inverse(self, square: Expr) -> Expr:
        """1 / norm of the values as they are rotated, 0 for 0."""
        some = square > f32(0)
        root = Registers(1, "float32")
        ptx("rsqrt.approx.ftz.f32", root[0], tir.Select(some, square, f32(1)))
        return scalar(tir.Select(some, root[0] * f32(1 / self.scale), f32(0)))

    def _coefficients(self, inverse: Expr) -> list[Expr]:
        """The polynomial's: for values of this norm, or of norm 1."""
        if not self.fused:
            return [f32(coefficient) for coefficient in self.polynomial]
        power, twice, found = inverse, scalar(inverse * inverse), []
        for number, coefficient in enumerate(self.polynomial):
            power = scalar(power * twice) if number else power
            found.append(scalar(power * f32(coefficient)))
        return found

    def _half(self, y: Registers, r: int) -> Expr:
        """The codes of four elements, a nibble each, in the low half of a word."""
        word: Expr = None
        for a, u in reversed(ELEMENTS):
            slot, value = self.order.slot(a, r, u), y[a * 4 + r * 2 + u]
            if not self.fused:
                value = scalar(value * self.inverses[slot])
            code = self._code(value, self.coefficients[slot])
            if self.wants_inner or self.wants_square:
                centroid = self._centroid(code)
                if self.wants_inner:
                    self.inner[slot] = self.inner[slot] + value * centroid
                if self.wants_square:
                    self.square[slot] = self.square[slot] + centroid * centroid
            word = code if word is None else scalar((word << u32(4)) + code)
        return word

    def _code(self, value: Expr, coefficients: Sequence[Expr]) -> Expr:
        """A code in the lowest bits of a word, others above them."""
        total = coefficients[-1]
        if len(coefficients) > 1:
            square = scalar(value * value)
            for coefficient in reversed(coefficients[:-1]):
                total = fma(total, square, coefficient)
        cell = Registers(1, "float32")
        part = fma(value, total, MIDDLE, saturate=True)
        largest = float(np.nextafter(np.float32(2**self.bits), np.float32(0)))
        ptx("fma.rz.ftz.f32", cell[0], part, f32(largest), f32(INTEGER))
        return bits_of(cell[0])

    def _table(self) -> Expr:
        """The centroids, one to a lane, again and again."""
        values = list(map(float, self.codec.codebook.centroids))
        number, held = scalar((self.order.lane % len(values)).astype("int32")), f32(values[-1])
        for k in reversed(range(len(values) - 1)):
            held = tir.Select(number == k, f32(values[k]), held)
        return scalar(held)

    def _centroid(self, code: Expr) -> Expr:
        """From the word that a code is the lowest five bits of: another lane has it.

        Worked out by multiply-adds, six to an element, it took a sixth longer: these are what there is too little of.
        """
        return shuffle(self.table, code)

    def _own_gain(self, squares: Sequence[Expr]) -> Expr:
        """The gain of the lane's own slot, of values that were rotated as they are."""
        sums = [list(self.inner)] * self.wants_inner + [list(self.square)] * self.wants_square
        found = self.order.own_sums(sums)
        norm = scalar(tir.sqrt(self.order.own(squares)))
        inner = scalar(found[0] * f32(1 / self.scale)) if self.wants_inner else f32(0)
        square = found[-1] if self.wants_square else f32(self.known_square)
        return half_bits(corrected_gain(self.codec.format.gain, norm, inner, square))

    def _gains(self, squares: Sequence[Expr]) -> list[Expr]:
        slots = self.order.slots
        wanted = [*(self.inner if self.wants_inner else ()), *(self.square if self.wants_square else ())]
        shared = share(wanted, self.order, lambda p, q: p + q)
        gains = []
        for slot, norm_square in enumerate(squares):
            norm = scalar(tir.sqrt(norm_square))
            lift = f32(1 / self.scale) if self.fused else norm
            inner = scalar(shared[slot] * lift) if self.wants_inner else f32(0)
            square = shared[slot - slots] if self.wants_square else f32(self.known_square)
            gains.append(half_bits(corrected_gain(self.codec.format.gain, norm, inner, square)))
        return gains
