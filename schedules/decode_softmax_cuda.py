"""Softmax weights of decode attention in registers, on CUDA, and the merge of a block's warps.

The exponent's reference lags behind the largest score: it moves only when a weight would leave the range that the
product with the values can take, so that the common path has no exchange between lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.online_softmax import MASKED

from .cuda_ops import Registers, across, any_lane, bits_of, block_sync, f32, float_of, scalar, shuffle, shuffle_xor

Expr = Any
HIDDEN = -3.0e38
"""The score of a token that is not attended to; further below every reference than exp2 can tell from 0."""
FARTHEST = float(2**40)
"""No sum of weights passes this without a move; tokens whose value is 0 have no other bound."""
SMALLEST_GAIN = float(2**-14)


class Weights:
    """Running reference and sum of the lane's query row; ``values`` sums values by the weights, ``count`` at a time."""

    def __init__(self, values: Any, count: int = 8) -> None:
        self.values = values
        self.reference, self.total = Registers(1, "float32"), Registers(1, "float32")
        self.weights = Registers(count, "float32")

    def start(self) -> None:
        """Nothing is attended to yet."""
        self.reference[0], self.total[0] = f32(MASKED), f32(0)
        self.values.start()

    def take(self, scores: Registers, gains: Registers | None, lane: Expr) -> Registers:
        """Turn the lane's scores into weights (``values.rounded``) and count them in."""
        shares = Registers(scores.count, "float32")
        most = self._weigh(scores, gains, shares)
        sums = scalar(_sum(shares))
        with T.If(any_lane(tir.Or(self.values.exceeds(most), sums > f32(FARTHEST)))), T.Then():
            self._move(scores, gains, lane)
            self._weigh(scores, gains, shares)
        self.total[0] = self.total[0] + _sum(shares)
        return self.weights

    def _weigh(self, scores: Registers, gains: Registers | None, shares: Registers) -> Expr:
        most = f32(0)
        for k in range(scores.count):
            shares[k] = tir.exp2(scores[k] - self.reference[0])
            self.weights[k] = self.values.rounded(shares[k], None if gains is None else gains[k], k)
            most = tir.max(most, self.weights[k])
        return scalar(most)

    def _move(self, scores: Registers, gains: Registers | None, lane: Expr) -> None:
        highest = Registers(1, "float32")
        highest[0] = f32(HIDDEN)
        for k in range(scores.count):
            score = scores[k]
            if gains is not None:
                score = score + tir.log2(tir.max(gains[k], f32(SMALLEST_GAIN)))
            highest[0] = tir.max(highest[0], score)
        row = across(highest[0], tir.max, (1, 2))
        room = math.floor(math.log2(self.values.limit + 1)) - self.values.head_room
        moved = scalar(tir.max(self.reference[0], row - f32(room)))
        decay = scalar(tir.exp2(self.reference[0] - moved))
        self.total[0] = self.total[0] * decay
        self.reference[0] = moved
        # Columns 2t and 2t + 1 of the sums are the rows of lanes 8t and 8t + 4.
        first = lane % 4 * 8
        self.values.scaled((shuffle(decay, first), shuffle(decay, first + 4)))


def _sum(shares: Registers) -> Expr:
    terms = list(shares)
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def merge_warps(
    weights: Weights,
    shared: Any,
    thread: Expr,
    shape: tuple[int, int, int],
    place: Callable[[int, int], Expr],
    store: Callable[[Expr, Expr, Expr, Expr, Expr], None],
) -> None:
    """Add up what the block's warps summed; ``shape``: warps, query rows, head_dim.

    ``place(j, half)`` is the dim of the lane's half of block j; ``store(row, dim, sum, reference, total)`` takes the
    results, each by one thread. Words 0 … ``merge_words`` of ``shared`` are overwritten.
    """
    warps, rows, head_dim = shape
    lane, warp = thread % 32, thread // 32
    total = across(weights.total[0], lambda a, b: a + b, (1, 2))
    block_sync()  # the warps have read all of their tiles
    sums_at = warps * rows * head_dim
    with T.If((lane % 4 == 0) & (lane // 4 < rows)), T.Then():
        at = sums_at + (warp * rows + lane // 4) * 2
        T.buffer_store(shared, bits_of(weights.reference[0]), [at])
        T.buffer_store(shared, bits_of(total), [at + 1])
    _put_sums(weights.values, shared, (lane, warp), (rows, head_dim), place)
    block_sync()

    def reference(w: int, row: Expr) -> Expr:
        return float_of(shared[sums_at + (w * rows + row) * 2])

    with T.serial(0, -(-rows * head_dim // (32 * warps))) as turn:
        item = turn * (32 * warps) + thread
        with T.If(item < rows * head_dim), T.Then():
            row, dim = item // head_dim, item % head_dim
            highest = reference(0, row)
            for w in range(1, warps):
                highest = tir.max(highest, reference(w, row))
            highest = scalar(highest)
            value, count = Registers(1, "float32"), Registers(1, "float32")
            value[0], count[0] = f32(0), f32(0)
            for w in range(warps):
                share = scalar(tir.exp2(reference(w, row) - highest))
                value[0] = value[0] + share * float_of(shared[(w * rows + row) * head_dim + dim])
                count[0] = count[0] + share * float_of(shared[sums_at + (w * rows + row) * 2 + 1])
            store(row, dim, scalar(value[0] * f32(weights.values.scale)), highest, count[0])


def _put_sums(
    values: Any, shared: Any, where: tuple[Expr, Expr], sizes: tuple[int, int], place: Callable[[int, int], Expr]
) -> None:
    """Write the lane's sums as float32 [warp, row, dim]."""
    (lane, warp), (rows, head_dim) = where, sizes
    t = lane % 4

    def put(column: Expr, dim: Expr, value: Expr) -> None:
        with T.If(column < rows), T.Then():
            T.buffer_store(shared, bits_of(value), [(warp * rows + column) * head_dim + dim])

    for j in range(values.blocks):
        parts = values.totals(j)
        if not values.narrow:
            for k, part in enumerate(parts):
                put(2 * t + k % 2, place(j, k // 2), scalar(part))
            continue
        # Lanes of the first two columns' pairs hold high bytes, the others low ones, of the same queries.
        high = t < 2
        parts = [scalar(part * tir.Select(high, f32(256), f32(1))) for part in parts]
        dim = tir.Select(high, place(j, 0), place(j, 1))
        for k in range(2):
            mine, theirs = tir.Select(high, parts[k], parts[2 + k]), tir.Select(high, parts[2 + k], parts[k])
            put(2 * t % 4 + k, dim, scalar(mine + shuffle_xor(theirs, 2)))


def merge_words(warps: int, rows: int, head_dim: int) -> int:
    """Words of shared memory that ``merge_warps`` takes."""
    return warps * rows * (head_dim + 2)
