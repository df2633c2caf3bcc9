"""The merge of decode attention's splits by log-sum-exp, on CUDA, by whichever block of a stream arrives last.

Partial results go through global memory; a counter per stream tells the last block that all of them are there. It
leaves the counter at zero, as it must find it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.online_softmax import MASKED

from .cuda_ops import Registers, bits_of, block_sync, f32, float_of, i32, load_words, ptx, scalar, u32

Expr = Any
AHEAD = 10
"""Splits whose partial results a thread asks for at a time."""
VECTOR = 4
"""Neighbouring dims that a thread merges."""


class Partials:
    """Partial results of ``parts`` blocks for each stream: sums float32 [rows, dims], references and totals [rows]."""

    def __init__(self, streams: Expr, parts: Expr, rows: int, head_dim: int) -> None:
        self.rows, self.head_dim = rows, head_dim
        self.sums = T.alloc_buffer((streams, parts, rows, head_dim), "float32", scope="global")
        self.scales = T.alloc_buffer((streams, parts, rows, 2), "float32", scope="global")

    def store(self, where: tuple[Expr, Expr], row: Expr, dim: Expr, values: tuple[Expr, Expr, Expr]) -> None:
        """Keep (sum, reference, total) of a (stream, part)."""
        T.buffer_store(self.sums, values[0], [*where, row, dim])
        with T.If(dim == 0), T.Then():
            for k in range(2):
                T.buffer_store(self.scales, values[1 + k], [*where, row, k])

    def merge(
        self,
        stream: Expr,
        parts: Expr,
        thread: tuple[Expr, int],
        shared: Any,
        store: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """Merge a stream's parts: ``store(row, dim, value)``, 0 where nothing was attended to.

        ``thread``: number and count. Threads that would have nothing to do take a share of the parts; ``shared`` is
        overwritten from word 0 on (``words``).
        """
        index, threads = thread
        items = self.rows * self.head_dim // VECTOR
        shares = max(1, threads // items)
        with T.serial(0, -(-items // threads)) as turn:
            item, share = (turn * threads + index, i32(0)) if shares == 1 else (index % items, index // items)
            row = scalar(item // (self.head_dim // VECTOR))
            dim = scalar(item % (self.head_dim // VECTOR) * VECTOR)
            sums = Registers(2 + VECTOR, "float32")
            with T.If(tir.And(item < items, share < shares)), T.Then():
                self._read(stream, parts, (row, dim), (share, shares), sums)
            if shares > 1:
                self._gather(sums, shared, (item, share), (items, shares))
            with T.If(tir.And(item < items, share == 0)), T.Then():
                for n in range(VECTOR):
                    store(row, dim + n, normalized(sums[2 + n], sums[1]))

    @staticmethod
    def words(rows: int, head_dim: int, threads: int) -> int:
        """Words of shared memory that ``merge`` takes."""
        return threads * (2 + VECTOR) if threads * VECTOR > rows * head_dim else 0

    def _read(
        self, stream: Expr, parts: Expr, where: tuple[Expr, Expr], share: tuple[Expr, int], sums: Registers
    ) -> None:
        """Merge parts share, share + shares, … of ``VECTOR`` dims of a row: sums = reference, total, values."""
        (row, dim), (first, step) = where, share
        sums.fill(f32(0))
        sums[0] = f32(MASKED)
        with T.serial(0, (parts + (AHEAD * step - 1)) // (AHEAD * step)) as turn:
            scales, values = Registers(2 * AHEAD, "float32"), Registers(VECTOR * AHEAD, "float32")
            values.fill(f32(0))
            # What is added to one base is an offset in the instruction; clamped parts have addresses of their own.
            base = scalar(turn * (AHEAD * step) + first)
            for k in range(AHEAD):
                scales[2 * k], scales[2 * k + 1] = f32(MASKED), f32(0)
                with T.If(base + k * step < parts), T.Then():
                    part = base + k * step
                    # Past this multiprocessor's own cache, which may hold what an earlier launch left there.
                    load_words(scales, 2 * k, self.scales, [stream, part, row, 0], 2, "global.cg")
                    load_words(values, VECTOR * k, self.sums, [stream, part, row, dim], VECTOR, "global.cg")
            highest = sums[0]
            for k in range(AHEAD):
                highest = tir.max(highest, scales[2 * k])
            highest = scalar(highest)
            _shrink(sums, highest)
            for k in range(AHEAD):
                weight = scalar(tir.exp2(scales[2 * k] - highest))
                sums[1] = sums[1] + weight * scales[2 * k + 1]
                for n in range(VECTOR):
                    sums[2 + n] = sums[2 + n] + weight * values[VECTOR * k + n]

    @staticmethod
    def _gather(sums: Registers, shared: Any, where: tuple[Expr, Expr], counts: tuple[int, int]) -> None:
        """Add up the shares of the parts, in the threads of the first one."""
        (item, share), (items, shares) = where, counts

        def at(share: Expr, n: int) -> Expr:
            return (n * shares + share) * items + item

        with T.If(tir.And(share > 0, share < shares)), T.Then():
            for n in range(sums.count):
                T.buffer_store(shared, bits_of(sums[n]), [at(share, n)])
        block_sync()
        with T.If(share == 0), T.Then():
            for other in range(1, shares):
                reference = float_of(shared[at(other, 0)])
                highest = scalar(tir.max(sums[0], reference))
                weight = scalar(tir.exp2(reference - highest))
                _shrink(sums, highest)
                for n in range(1, sums.count):
                    sums[n] = sums[n] + weight * float_of(shared[at(other, n)])
        block_sync()


def _shrink(sums: Registers, reference: Expr) -> None:
    """Let sums (reference, total, values) stand off another reference."""
    decay = scalar(tir.exp2(sums[0] - reference))
    sums[0] = reference
    for n in range(1, sums.count):
        sums[n] = sums[n] * decay


def normalized(value: Expr, total: Expr) -> Expr:
    """The quotient, or 0 where nothing was attended to."""
    return value / tir.Select(total > f32(0), total, f32(1))


def arrives_last(arrivals: Any, stream: Expr, parts: Expr, shared: Any, thread: Expr) -> Expr:
    """Count this block in; whether it is the last of the stream's ``parts`` (known to every thread).

    What the block wrote before is seen by the one that arrives last. Overwrites word 0 of ``shared``.
    """
    block_sync()
    with T.If(thread == 0), T.Then():
        before = Registers(1)
        ptx("atom.acq_rel.gpu.global.add.u32", before[0], arrivals.ptr_to([stream]), u32(1))
        last = i32(before[0]) == parts - 1
        with T.If(last), T.Then():
            T.buffer_store(arrivals, i32(0), [stream])
        T.buffer_store(shared, tir.Select(last, u32(1), u32(0)), [0])
    block_sync()
    return scalar(shared[0]) == u32(1)
