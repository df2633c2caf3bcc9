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

from .cuda_ops import (
    Registers,
    across,
    any_lane,
    bits_of,
    block_sync,
    f32,
    float_of,
    load_words,
    scalar,
    shuffle,
    shuffle_xor,
)

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

    def take_first(self, scores: Registers, lane: Expr) -> Registers:
        """As ``take``, for scores that are likely to move the reference: it does so without a trial before."""
        shares = Registers(scores.count, "float32")
        self._move(scores, None, lane)
        self._weigh(scores, None, shares)
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


class SumSlots:
    """Sums of several warps in shared memory: of ``slots`` × query rows, float32 [head_dim], reference and total."""

    def __init__(self, shared: Any, first: int, slots: int, rows: int, head_dim: int) -> None:
        """``first``: where they begin in ``shared`` (uint32); they take ``words`` of it."""
        self.shared, self.first, self.slots, self.rows, self.head_dim = shared, first, slots, rows, head_dim

    @staticmethod
    def words(slots: int, rows: int, head_dim: int) -> int:
        """Words of shared memory."""
        return slots * rows * (head_dim + 2)

    def put(self, weights: Weights, slot: Expr, lane: Expr, place: Callable[[int, int], Expr]) -> None:
        """Store what a warp summed; ``place(j, half)`` is the dim of the lane's half of block j."""
        total = across(weights.total[0], lambda a, b: a + b, (1, 2))
        with T.If((lane % 4 == 0) & (lane // 4 < self.rows)), T.Then():
            T.buffer_store(self.shared, bits_of(weights.reference[0]), [self._scales(slot, lane // 4)])
            T.buffer_store(self.shared, bits_of(total), [self._scales(slot, lane // 4) + 1])
        _put_sums(weights.values, lane, self.rows, place, lambda *where: self._store(slot, *where))

    def _store(self, slot: Expr, row: Expr, dim: Expr, value: Expr) -> None:
        T.buffer_store(self.shared, bits_of(value), [self._sum(slot, row, dim)])

    def _sum(self, slot: Expr, row: Expr, dim: Expr) -> Expr:
        return self.first + (slot * self.rows + row) * self.head_dim + dim

    def _scales(self, slot: Expr, row: Expr) -> Expr:
        return self.first + self.slots * self.rows * self.head_dim + (slot * self.rows + row) * 2

    def reference(self, slot: Expr, row: Expr) -> Expr:
        """The exponent that a slot's sums stand off."""
        return float_of(self.shared[self._scales(slot, row)])

    def add(self, slot: Expr, where: tuple[Expr, Expr], highest: Expr, sums: Registers, factor: float = 1) -> None:
        """Add a slot's values from (row, dim) on, times ``factor``, and its total to ``sums`` at ``highest``."""
        row, dim = where
        share, count = scalar(tir.exp2(self.reference(slot, row) - highest)), sums.count - 1
        scaled = share if factor == 1 else scalar(share * f32(factor))
        values = Registers(count, "float32")
        load_words(values, 0, self.shared, [self._sum(slot, row, dim)], count, "shared")
        for k in range(count):
            sums[k] = sums[k] + scaled * values[k]
        sums[count] = sums[count] + share * float_of(self.shared[self._scales(slot, row) + 1])


def merge_slots(
    own: SumSlots,
    scale: float,
    thread: Expr,
    store: Callable[[Expr, Expr, Expr, Expr, Expr], None],
    others: tuple[SumSlots, Expr] | None = None,
) -> None:
    """Add up what a block's warps summed; ``own`` sums are times ``scale``.

    ``others``: slots of sums that are not, and how many of them, from the last one down, are in use.
    ``store(row, dim, sum, reference, total)`` takes the results, each by one thread.
    """
    block_sync()
    items, threads = own.rows * own.head_dim, 32 * own.slots
    wide = max(n for n in (1, 2, 4) if n == 1 or n * threads <= items)
    with T.serial(0, -(-items // (wide * threads))) as turn:
        item = (turn * threads + thread) * wide
        with T.If(item < items), T.Then():
            where = row, dim = scalar(item // own.head_dim), scalar(item % own.head_dim)
            highest, sums = Registers(1, "float32"), Registers(wide + 1, "float32")
            highest[0] = own.reference(0, row)
            for slot in range(1, own.slots):
                highest[0] = tir.max(highest[0], own.reference(slot, row))
            if others is not None:
                more, count = others
                with T.serial(0, count) as number:
                    highest[0] = tir.max(highest[0], more.reference(more.slots - 1 - number, row))
            sums.fill(f32(0))
            for slot in range(own.slots):
                own.add(slot, where, highest[0], sums)
            if others is not None:
                with T.serial(0, count) as number:
                    more.add(more.slots - 1 - number, where, highest[0], sums, 1 / scale)
            for n in range(wide):
                store(row, dim + n, sums[n] * f32(scale), highest[0], sums[wide])


def _put_sums(
    values: Any,
    lane: Expr,
    rows: int,
    place: Callable[[int, int], Expr],
    store: Callable[[Expr, Expr, Expr], None],
) -> None:
    """Hand the lane's sums as float32 to ``store(row, dim, value)``."""
    t = lane % 4

    def put(column: Expr, dim: Expr, value: Expr) -> None:
        with T.If(column < rows), T.Then():
            store(column, dim, value)

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
