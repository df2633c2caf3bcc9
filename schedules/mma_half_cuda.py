"""Attention's two products and its softmax on float16 tensor cores, on CUDA, for the rows of one warp.

A warp owns ``row_tiles`` · 16 query rows. Keys, values and queries stand in shared memory as float16 rows that are 16
bytes longer than a vector: an odd number of 16-byte units apart, eight rows lie in different banks, and every address
is one register plus a constant. Scores stay in the registers that the first product leaves them in, and become
operands of the second one in place (Dao, "FlashAttention-2", arXiv:2307.08691).

In an accumulator of 16 rows and 8 columns lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8, columns 2t and
2t + 1, in the order (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import (
    Registers,
    across,
    any_lane,
    f32,
    load_words,
    mma_half,
    pack_half2,
    ptx,
    scalar,
    shuffle_xor,
)

Expr = Any
HIDDEN = -3.0e38
"""The score of a token that a row does not see: no factor brings it near ``NOTHING``."""
NOTHING = -1.0e30
"""The peak of a row that has seen no token yet."""
HEADROOM = 8.0
"""A peak moves when a score passes it by so many octaves: weights then reach 2^8 at most, far from float16's limit."""

Load = Callable[[Registers, int, int, int], None]
"""(target, at, tokens, dims): load operands of the 16 tokens and 16 dims with these numbers, four words."""


def exp2(value: Expr) -> Expr:
    """2^value, approximately (2 units in the last place)."""
    cell = Registers(1, "float32")
    ptx("ex2.approx.ftz.f32", cell[0], value)
    return cell[0]


def load_matrices(target: Registers, at: int, shared: Any, index: Expr, transposed: bool = False) -> None:
    """Load four 8x8 matrices of float16; ``index``: where this lane's row starts, matrix lane / 8, row lane % 8."""
    name = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16"
    ptx(name, *(target[at + k] for k in range(4)), shared.ptr_to([index]))


def first_product(total: Registers, at: int, a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """As ``mma_half``, but total[at … at+3] = A·B."""
    lanes = [total[at + k] for k in range(4)]
    ptx("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", *lanes, *a, *b, *(f32(0) for _ in lanes))


class HalfRows:
    """Rows of ``head_dim`` float16 from element ``first`` of a shared buffer on, as operands of matrix products."""

    def __init__(self, shared: Any, first: Expr, head_dim: int, lane: Expr) -> None:
        self.shared, self.pitch = shared, row_pitch(head_dim)
        low, middle, high = lane % 8, lane // 8 % 2, lane // 16
        self._rows = scalar(first + (low + middle * 8) * self.pitch + high * 8, "int32")
        self._tokens = scalar(first + (low + high * 8) * self.pitch + middle * 8, "int32")

    def load_rows(self, target: Registers, at: int, rows: int, dims: int) -> None:
        """The left operand of rows 16·``rows`` … and dims 16·``dims`` …, four words."""
        load_matrices(target, at, self.shared, self._rows + (16 * rows * self.pitch + 16 * dims))

    def load_keys(self, target: Registers, at: int, tokens: int, dims: int, offset: Expr = 0) -> None:
        """The right operands q·k of two blocks of eight tokens, from 16·``tokens`` on, two words each."""
        load_matrices(target, at, self.shared, self._tokens + (16 * tokens * self.pitch + 16 * dims) + offset)

    def load_values(self, target: Registers, at: int, tokens: int, dims: int, offset: Expr = 0) -> None:
        """The right operands p·v of two blocks of eight dims, from 16·``dims`` on, two words each."""
        load_matrices(target, at, self.shared, self._rows + (16 * tokens * self.pitch + 16 * dims) + offset, True)


def row_pitch(head_dim: int) -> int:
    """Elements from one row in shared memory to the next."""
    return head_dim + 8


class FragmentValues:
    """Values in the order of the second product's operands: 16 bytes a lane for 16 tokens and 16 dims."""

    def __init__(self, shared: Any, first: Expr, head_dim: int, lane: Expr) -> None:
        self.shared, self.blocks = shared, head_dim // 16
        self._lane = scalar(first + lane * 8, "int32")

    def place(self, tokens: Expr, dims: Expr) -> Expr:
        """Where this lane's four words of 16 tokens and 16 dims start."""
        return self._lane + (tokens * self.blocks + dims) * 256

    def load_values(self, target: Registers, at: int, tokens: int, dims: int) -> None:
        """As ``HalfRows.load_values``."""
        words = Registers(4)
        load_words(words, 0, self.shared, [self.place(tokens, dims)], 4, "shared")
        for k in range(4):
            target[at + k] = words[k]


class WarpAttention:
    """Online softmax of a warp's rows over stages of ``tokens`` tokens; create it where its registers should be.

    ``clear`` it before the first stage; products of queries that come before need the sums' registers.
    """

    def __init__(self, head_dim: int, tokens: int, row_tiles: int) -> None:
        self.head_dim, self.tokens, self.row_tiles = head_dim, tokens, row_tiles
        self.scores = Registers(row_tiles * tokens // 2, "float32")
        self.output = Registers(row_tiles * head_dim // 2, "float32")
        self.peak, self.total = (Registers(2 * row_tiles, "float32") for _ in range(2))

    def clear(self) -> None:
        """Forget all stages."""
        self.output.fill(f32(0))
        self.peak.fill(f32(NOTHING))
        self.total.fill(f32(0))

    def score(self, tile: int, block: int, part: int) -> int:
        """Where the score of rows 16·``tile`` …, tokens 8·``block`` …, stands; ``part`` as in an accumulator."""
        return (tile * self.tokens // 8 + block) * 4 + part

    def multiply_keys(self, queries: HalfRows, load: Load) -> None:
        """Scores = q·k; ``load(target, at, tokens, dims)`` as ``HalfRows.load_keys``."""
        depth, width = self.head_dim // 16, self.tokens // 16
        steps = [(dims, tokens) for dims in range(depth) for tokens in range(width)]
        rows, keys = Registers(8 * self.row_tiles), Registers(8)
        self._load_queries(queries, rows, 0)
        load(keys, 0, 0, 0)
        for number, (dims, tokens) in enumerate(steps):
            if number + 1 < len(steps):
                after_dims, after_tokens = steps[number + 1]
                load(keys, 4 * ((number + 1) % 2), after_tokens, after_dims)
                if after_dims > dims:
                    self._load_queries(queries, rows, after_dims)
            for tile in range(self.row_tiles):
                a = [rows[4 * (dims % 2 * self.row_tiles + tile) + k] for k in range(4)]
                for block in range(2):
                    b = [keys[4 * (number % 2) + 2 * block + k] for k in range(2)]
                    product = mma_half if dims else first_product
                    product(self.scores, self.score(tile, 2 * tokens + block, 0), a, b)

    def _load_queries(self, queries: HalfRows, rows: Registers, dims: int) -> None:
        for tile in range(self.row_tiles):
            queries.load_rows(rows, 4 * (dims % 2 * self.row_tiles + tile), tile, dims)

    def scale_scores(self, factors: Callable[[int], list[Expr]]) -> None:
        """Multiply scores by factors of tokens; ``factors(block)``: those of 2t and 2t + 1 of a block of eight."""
        for block in range(self.tokens // 8):
            pair = factors(block)
            for tile in range(self.row_tiles):
                for part in range(4):
                    at = self.score(tile, block, part)
                    self.scores[at] = self.scores[at] * pair[part % 2]

    def hide(self, seen: Callable[[int, Expr], Expr], lane: Expr) -> None:
        """Keep the scores where ``seen(row, token)``; ``row`` counts the lane's rows: 2·tile, and 1 more for g + 8."""
        for row in range(2 * self.row_tiles):
            for column in range(self.tokens // 4):
                at = self.score(row // 2, column // 2, row % 2 * 2 + column % 2)
                token = lane % 4 * 2 + (column // 2 * 8 + column % 2)
                self.scores[at] = tir.Select(seen(row, token), self.scores[at], f32(HIDDEN))

    def weigh(self, factor: Expr, boost: float = 0.0) -> None:
        """Turn scores into weights 2^(factor·score − peak + boost), moving peaks and adding up the totals.

        ``factor``: softmax scale · log2(e), and what else all scores lack. ``boost``: log2 of what the values lack.
        """
        rows = range(2 * self.row_tiles)
        scaled = Registers(2 * self.row_tiles, "float32")
        for row in rows:
            first, *others = self._row(row)
            for other in others:
                first = tir.max(first, other)
            scaled[row] = first * factor
        moves = [scaled[row] > self.peak[row] + f32(HEADROOM) for row in rows]
        with T.If(any_lane(tir.any(*moves))), T.Then():
            self._move_peaks(scaled)
        for row in rows:
            lowered = scalar(f32(boost) - self.peak[row] if boost else f32(0) - self.peak[row])
            for at in self._places(row):
                self.scores[at] = exp2(self.scores[at] * factor + lowered)
            sums = list(self._row(row))
            while len(sums) > 1:
                sums = [scalar(a + b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            share = sums[0] * f32(2.0**-boost) if boost else sums[0]
            self.total[row] = self.total[row] + share

    def _places(self, row: int) -> list[int]:
        tile, half = divmod(row, 2)
        return [self.score(tile, block, 2 * half + u) for block in range(self.tokens // 8) for u in range(2)]

    def _row(self, row: int) -> list[Expr]:
        return [self.scores[at] for at in self._places(row)]

    def _move_peaks(self, scaled: Registers) -> None:
        """Rescale what was summed up to the new peaks of all rows."""
        for row in range(2 * self.row_tiles):
            peak = tir.max(self.peak[row], across(scaled[row], tir.max, (1, 2)))
            peak = scalar(peak)
            decay = exp2(self.peak[row] - peak)
            self.peak[row] = peak
            self.total[row] = self.total[row] * decay
            self._lower(row, decay)

    def _lower(self, row: int, decay: Expr) -> None:
        for at in self.output_places(row):
            self.output[at] = self.output[at] * decay

    def output_places(self, row: int) -> list[int]:
        """Where the lane's outputs of a row stand, dims 2t and 2t + 1 of each block of eight."""
        tile, half = divmod(row, 2)
        blocks = self.head_dim // 8
        return [(tile * blocks + block) * 4 + 2 * half + u for block in range(blocks) for u in range(2)]

    def multiply_values(self, load: Load) -> None:
        """Output += weights·v; ``load(target, at, tokens, dims)`` as ``HalfRows.load_values``."""
        width, depth = self.head_dim // 16, self.tokens // 16
        steps = [(tokens, dims) for tokens in range(depth) for dims in range(width)]
        values, weights = Registers(8), Registers(4 * self.row_tiles * depth)
        load(values, 0, 0, 0)
        for number, (tokens, dims) in enumerate(steps):
            if dims == 0:
                self.round_weights(weights, tokens)
            if number + 1 < len(steps):
                load(values, 4 * ((number + 1) % 2), *steps[number + 1])
            for tile in range(self.row_tiles):
                a = [weights[4 * (tokens * self.row_tiles + tile) + k] for k in range(4)]
                for block in range(2):
                    b = [values[4 * (number % 2) + 2 * block + k] for k in range(2)]
                    mma_half(self.output, (tile * self.head_dim // 8 + 2 * dims + block) * 4, a, b)

    def round_weights(self, weights: Registers, tokens: int) -> None:
        """Make the weights of 16 tokens left operands: an accumulator's blocks stand as an operand's do."""
        for tile in range(self.row_tiles):
            for k in range(4):
                at = self.score(tile, 2 * tokens + k // 2, k % 2 * 2)
                weights[4 * (tokens * self.row_tiles + tile) + k] = pack_half2(self.scores[at], self.scores[at + 1])

    def finish(self) -> None:
        """Divide by the totals of the whole rows; 0 where nothing was attended to."""
        for row in range(2 * self.row_tiles):
            _, share = self.whole_total(row)
            for at in self.output_places(row):
                self.output[at] = self.output[at] * share

    def whole_total(self, row: int) -> tuple[Expr, Expr]:
        """The total of a row over its lanes, and what normalizes by it: 0 where nothing was attended to."""
        total = self.total[row]
        for mask in (1, 2):
            total = scalar(total + shuffle_xor(total, mask))
        return total, scalar(tir.Select(total > f32(0), f32(1) / tir.Select(total > f32(0), total, f32(1)), f32(0)))
