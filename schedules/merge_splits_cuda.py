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

from .cuda_ops import Registers, block_sync, f32, i32, load_words, ptx, scalar, u32

Expr = Any
AHEAD = 12
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
        self, stream: Expr, parts: Expr, thread: Expr, threads: int, store: Callable[[Expr, Expr, Expr], None]
    ) -> None:
        """Merge a stream's parts: ``store(row, dim, value)``, 0 where nothing was attended to."""
        items = self.rows * self.head_dim // VECTOR
        with T.serial(0, -(-items // threads)) as turn:
            item = turn * threads + thread
            with T.If(item < items), T.Then():
                row = scalar(item // (self.head_dim // VECTOR))
                dim = scalar(item % (self.head_dim // VECTOR) * VECTOR)
                self._merge_few(stream, parts, (row, dim), store)

    def _merge_few(self, stream: Expr, parts: Expr, where: tuple[Expr, Expr], store: Any) -> None:
        """Merge ``VECTOR`` neighbouring dims of a row."""
        row, dim = where
        reference, total, values = Registers(1, "float32"), Registers(1, "float32"), Registers(VECTOR, "float32")
        reference[0], total[0] = f32(MASKED), f32(0)
        values.fill(f32(0))
        with T.serial(0, (parts + (AHEAD - 1)) // AHEAD) as turn:
            scales, sums = Registers(2 * AHEAD, "float32"), Registers(VECTOR * AHEAD, "float32")
            for k in range(AHEAD):
                part = scalar(tir.min(turn * AHEAD + k, parts - 1))
                # Past this multiprocessor's own cache, which may hold what an earlier launch left there.
                load_words(scales, 2 * k, self.scales, [stream, part, row, 0], 2, "global.cg")
                load_words(sums, VECTOR * k, self.sums, [stream, part, row, dim], VECTOR, "global.cg")
            highest = reference[0]
            for k in range(AHEAD):
                highest = tir.max(highest, scales[2 * k])
            highest = scalar(highest)
            decay = scalar(tir.exp2(reference[0] - highest))
            reference[0], total[0] = highest, total[0] * decay
            for n in range(VECTOR):
                values[n] = values[n] * decay
            for k in range(AHEAD):
                there = turn * AHEAD + k < parts
                share = scalar(tir.Select(there, tir.exp2(scales[2 * k] - highest), f32(0)))
                total[0] = total[0] + share * scales[2 * k + 1]
                for n in range(VECTOR):
                    values[n] = values[n] + share * sums[VECTOR * k + n]
        for n in range(VECTOR):
            store(row, dim + n, normalized(values[n], total[0]))


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
