"""The rotation of a tile's tokens as a product of matrices on tensor cores, on CUDA.

The layers are multiplied out to one d×d matrix, whose 16×16 blocks stand in shared memory as operands; blocks that no
path through the layers reaches are left out. Rotated elements come out where a tile's lanes want them (``Lane``): keys
with the tokens as the left factor and the matrix's rows in the order of a tile's dims, values the other way round.

Tensor cores multiply 16-bit numbers. Where the matrix's entries are such numbers one product does; else an entry is the
sum of two float16 (or three bfloat16), with an error of 2^-24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codec

from .cuda_ops import WARP, Registers, block_sync, f32, i32, load_words, scalar, store_words, u32
from .matrix_entries_cuda import Half, MatrixPath, is_exact, paths
from .quartet_layer_cuda import QuartetLayer
from .tile_lane_cuda import Lane
from .tile_rows_cuda import HalfTileRows, multiply

Expr = Any
TOGETHER = 4
"""Paths that a thread follows at a time."""


class TileRotation:
    """R x of half tiles; without layers the identity, which brings values into a tile's order all the same."""

    def __init__(
        self, codec: Codec, dtype: str, role: str, scale: float = 1.0, outer: QuartetLayer | None = None
    ) -> None:
        """Plan it, emitting nothing; ``dtype`` is the rows' (float32 rows are multiplied as bfloat16).

        ``scale``: a power of two that all results are multiplied by. ``outer``: how the last layer is applied, which
        is not in the matrix then (only ``rotated`` can be asked for).
        """
        self.scale, self.outer = scale, outer
        self.structure, self.head_dim, self.role = codec.rotation.structure, codec.head_dim, role
        if outer is not None:
            self.structure = self.structure[:-1]
        self.operand = "f16" if dtype == "float16" else "bf16"
        self.planes = 1 if is_exact(codec) else (2 if self.operand == "f16" else 3)
        self.blocks = self.head_dim // 16
        count = paths(self.structure, self.head_dim)
        self.possible = bool((count <= 1).all())
        self._reached = count.reshape(self.blocks, 16, self.blocks, 16).any((1, 3))
        self._sparse = bool((count[self._reached.repeat(16, 0).repeat(16, 1)] == 0).any())
        self._diagonal = not self._reached[~np.eye(self.blocks, dtype=bool)].any()

    @property
    def identity(self) -> bool:
        """Whether there is nothing to rotate."""
        return not self.structure

    @property
    def _stored(self) -> int:
        """Blocks per plane in shared memory."""
        return self.blocks if self._diagonal else self.blocks**2

    @property
    def words(self) -> int:
        """32-bit words of shared memory."""
        if self.identity:
            return 0
        return self._matrix_words + (0 if self.outer is None else self.outer.words)

    @property
    def _matrix_words(self) -> int:
        return (self.planes if self.outer is None else 2) * self._stored * 4 * WARP

    def fetch(self, coefficients: Any, thread: Expr, threads: int) -> None:
        """Start to multiply the layers out, all threads of the block together; ``coefficients`` is ``Rotation.data``.

        Only loads: what is emitted next need not wait for them.
        """
        first_block, first_stride = self.structure[0]
        wide = first_block if first_stride == 1 and first_block in (2, 4) else 1
        leaves = self.head_dim * int(np.prod([block for block, _ in self.structure])) // wide
        rounds = -(-leaves // threads)
        together = min(rounds, TOGETHER)

        def load(step: Expr) -> list[MatrixPath]:
            numbers = [scalar((step * together + n) * threads + thread, "int32") for n in range(together)]
            return [self._load_path(coefficients, number, leaves, wide) for number in numbers]

        self._first, self._load_more, self._steps = load(i32(0)), load, -(-rounds // together)
        if self.outer is not None:
            self._quartets = self.outer.fetch_quartets(coefficients, thread % WARP)

    def prepare(self, shared: Any, first: int, thread: Expr, threads: int) -> None:
        """Multiply them out, from half ``first`` of ``shared`` (uint16) on; the block must be synchronized then."""
        self.shared, self.first = shared, first
        if self._sparse:
            self._clear(shared, thread, threads)
            block_sync()
        self._multiply_out(self._first)
        if self._steps > 1:
            with T.serial(0, self._steps - 1) as step:
                # All their loads before any store, which they would wait for.
                self._multiply_out(self._load_more(step + 1))
        if self.outer is not None:
            with T.If(thread < WARP), T.Then():
                self.outer.store(self._quartets, shared, first + 2 * self._matrix_words, thread)

    def _multiply_out(self, found: Sequence[MatrixPath]) -> None:
        for path in found:
            with T.If(path.exists), T.Then():
                product = None
                for factor in path.factors[1:]:
                    product = factor if product is None else scalar(product * factor)
                if self.scale != 1:
                    product = f32(self.scale) if product is None else scalar(product * f32(self.scale))
                values = path.factors[0]
                for first in range(0, len(values), 2):
                    pair = values[first : first + 2]
                    pair = pair if product is None else [scalar(value * product) for value in pair]
                    self._store(path.output, path.inputs + first, pair)

    def _clear(self, shared: Any, thread: Expr, threads: int) -> None:
        with T.serial(0, -(-self._matrix_words // (4 * threads))) as step:
            at = (step * threads + thread) * 4
            with T.If(at < self._matrix_words), T.Then():
                store_words(shared, [at * 2 + self.first], [u32(0)] * 4, "shared")

    def _load_path(self, coefficients: Any, number: Expr, leaves: int, wide: int) -> MatrixPath:
        """One path, or ``wide`` of them that differ in the first layer alone."""
        leaf = tir.min(number, i32(leaves - 1))
        offsets = np.cumsum([0, *(block * self.head_dim for block, _ in self.structure)])
        widths = [block for block, _ in self.structure]
        widths[0] //= wide
        digits = []
        for width in widths:
            digits.append(scalar(leaf % width, "int32") if width > 1 else tir.const(0, "int32"))
            leaf = leaf // width
        output = scalar(leaf, "int32")
        row, factors = output, []
        if self.outer is not None:
            factors.append(self.outer.factor(self.outer.fetch(coefficients, output), output))
        for layer in reversed(range(1, len(self.structure))):
            block, stride = self.structure[layer]
            factor = Registers(1, "float32")
            load_words(factor, 0, coefficients, [row * block + digits[layer] + int(offsets[layer])], 1, "global.nc")
            factors.append(factor[0])
            row = scalar(self._base(row, block, stride) + digits[layer] * stride, "int32")
        block, stride = self.structure[0]
        first = Registers(wide, "float32")
        load_words(first, 0, coefficients, [row * block + digits[0] * wide], wide, "global.nc")
        inputs = scalar(self._base(row, block, stride) + digits[0] * (wide * stride), "int32")
        return MatrixPath(number < leaves, output, inputs, [list(first), *factors])

    def _base(self, row: Expr, block: int, stride: int) -> Expr:
        if stride > 1:
            return row - row // stride % block * stride
        base = row // block * block
        return base if self.head_dim % block == 0 else tir.min(base, self.head_dim - block)

    def _store(self, output: Expr, inputs: Expr, values: Sequence[Expr]) -> None:
        """Store one entry, or two of neighbouring inputs, in every plane."""
        word, odd = self._place(output, inputs)
        rest = list(values)
        for plane in range(self.planes):
            halves = [Half(value, self.operand) for value in rest]
            at = (word + plane * (self._stored * 4 * WARP)) * 2 + self.first
            if len(values) == 2:
                pair = scalar(halves[0].bits | halves[1].bits << u32(16))
                store_words(self.shared, [at], [pair], "shared")
                if self.outer is not None:
                    opposite = [scalar(pair ^ u32(0x80008000))]
                    store_words(self.shared, [at + self._stored * (8 * WARP)], opposite, "shared")
            else:
                T.buffer_store(self.shared, halves[0].bits.astype("uint16"), [at + odd])
            rest = [scalar(value - half.value) for value, half in zip(rest, halves, strict=True)]

    def _place(self, output: Expr, inputs: Expr) -> tuple[Expr, Expr]:
        """(word, half of it) of an entry in its plane."""
        t, eight, o = inputs % 8 // 2, inputs % 16 // 8, output % 16
        if self.role == "k":
            g, word = o // 4 * 2 + o % 2, o % 4 // 2 * 2 + eight
        else:
            g, word = o % 8, eight * 2 + o // 8
        block = output // 16 if self._diagonal else output // 16 * self.blocks + inputs // 16
        return scalar((block * WARP + g * 4 + t) * 4 + word, "int32"), inputs % 2

    def apply(self, total: Registers, rows: HalfTileRows, order: Lane) -> None:
        """total[(k·2 + a)·4 + r·2 + u] = the element (a, r, u) of dims 16k … of R x (see ``Lane``)."""
        if self.plain:
            for k in range(self.blocks):
                for r in range(2):
                    for e, value in enumerate(rows.four(k, r)):
                        total[(k * 2 + e // 2) * 4 + r * 2 + e % 2] = value
            return
        total.fill(f32(0))
        self._multiply(total, rows.operands, order)

    @property
    def period(self) -> int:
        """So many blocks of 16 outputs after another, a block needs the same inputs; ``blocks`` if none does."""
        steps = [n for n in range(1, self.blocks) if self.blocks % n == 0]
        same = (n for n in steps if (self._reached[n:] == self._reached[:-n]).all())
        return next(same, self.blocks)

    def rotated(self, k: int, words: Sequence[Expr], order: Lane, ahead: Expr = 0) -> Registers:
        """Dims 16k … of R x: the element (a, r, u) at a·4 + r·2 + u. ``words``: the rows' operands, four to 16 dims.

        ``ahead``: a multiple of ``period`` to add to k.
        """
        total = Registers(8, "float32")
        total.fill(f32(0))
        for inputs in range(self.blocks):
            for plane in range(self.planes) if self._reached[k, inputs] else ():
                matrix = self._load(plane, k, inputs, order, ahead * (1 if self._diagonal else self.blocks))
                self._block(total, 0, matrix, words[4 * inputs : 4 * inputs + 4])
        return total

    def sum_and_difference(self, k: int, other: int, words: Sequence[Expr], order: Lane) -> tuple[Registers, Registers]:
        """Blocks k and ``other`` of what the matrix gives before the layer ``outer``: added, and subtracted."""
        first, both, apart = (Registers(8, "float32") for _ in range(3))
        first.fill(f32(0))
        self._block(first, 0, self._load(0, k, k, order), words[4 * k : 4 * k + 4])
        right = words[4 * other : 4 * other + 4]
        self._block(both, 0, self._load(0, other, other, order), right, first)
        self._block(apart, 0, self._load(1, other, other, order), right, first)
        return both, apart

    @property
    def plain(self) -> bool:
        """Whether the elements are read one by one, and clipped then."""
        return self.identity and self.role == "k"

    def repair(self, total: Registers, rows: HalfTileRows, order: Lane) -> None:
        """Do it again with rows that are clipped to the finite float16 range."""
        total.fill(f32(0))
        if rows.dtype == "bfloat16":
            self._multiply(total, rows.rests, order)
        rows.clip_rows()
        self._multiply(total, rows.operands, order)

    def _multiply(self, total: Registers, operands: Callable[[int, bool], list[list[Expr]]], order: Lane) -> None:
        unit = self._unit(order) if self.identity else None
        for inputs in range(self.blocks):
            terms = operands(inputs, self.role == "k")
            for outputs in range(self.blocks):
                if unit is not None and inputs == outputs:
                    for row in terms:
                        self._block(total, outputs, unit, row)
                elif unit is None and self._reached[outputs, inputs]:
                    for plane in range(self.planes):
                        matrix = self._load(plane, outputs, inputs, order)
                        for row in terms[: max(1, 3 - plane)]:  # further products are below the terms' own error
                            self._block(total, outputs, matrix, row)

    def _load(self, plane: int, outputs: int, inputs: int, order: Lane, ahead: Expr = 0) -> list[Expr]:
        block = ahead + plane * self._stored + (outputs if self._diagonal else outputs * self.blocks + inputs)
        matrix = Registers(4)
        load_words(matrix, 0, self.shared, [block * (8 * WARP) + order.lane * 8 + self.first], 4, "shared")
        return list(matrix)

    def _block(
        self,
        total: Registers,
        outputs: int,
        matrix: Sequence[Expr],
        rows: Sequence[Expr],
        before: Registers | None = None,
    ) -> None:
        """Add a product to ``total``, or to ``before``."""
        for a in range(2):
            at = (outputs * 2 + a) * 4
            if self.role == "k":
                multiply(total, at, rows, matrix[2 * a : 2 * a + 2], self.operand, before)
            else:
                multiply(total, at, matrix, rows[2 * a : 2 * a + 2], self.operand, before)

    def _unit(self, order: Lane) -> list[Expr]:
        """The left operand that is a 16×16 unit matrix."""
        one, g, t = 0x3C00 if self.operand == "f16" else 0x3F80, order.lane // 4, order.lane % 4
        first = tir.Select(g == 2 * t, u32(one), tir.Select(g == 2 * t + 1, u32(one << 16), u32(0)))
        word = scalar(first)
        return [word, u32(0), u32(0), word]
