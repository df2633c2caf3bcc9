"""Online softmax over tiles of 32 tokens: the loop body that decode and prefill attention share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .axes import Axes
from .vector_code import f32

Expr = Any
MASKED = -1.0e30
LOG2E = 1.4426950408889634


class OnlineSoftmax:
    """State of ``rows`` queries against one stream of keys and values of ``head_dim``.

    ``peak`` (in units of log2), ``total`` and ``output`` [rows, head_dim] are unnormalized until the end, so that
    partial results of several streams merge by log-sum-exp. A ``Source`` gives the keys and values of a tile.
    """

    def __init__(self, axes: Axes, rows: int, head_dim: int) -> None:
        self.axes, self.rows, self.head_dim = axes, rows, head_dim

        def alloc(size: int) -> Any:
            return T.sblock_alloc_buffer((size,), "float32", scope=axes.scratch)

        self.query, self.output = alloc(rows * head_dim), alloc(rows * head_dim)
        self.score = alloc(rows * 32)
        self.peak, self.total, self.decay = alloc(rows), alloc(rows), alloc(rows)

    def start(self, load_query: Callable[[Expr, Expr], Expr], scale: float) -> None:
        """Load the queries, times the softmax scale and log2(e), and clear the sums."""
        with self.axes.lanes(self.rows * self.head_dim) as i:
            T.buffer_store(self.query, load_query(i // self.head_dim, i % self.head_dim) * f32(scale * LOG2E), [i])
            T.buffer_store(self.output, f32(0), [i])
        with self.axes.lanes(self.rows) as row:
            T.buffer_store(self.peak, f32(MASKED), [row])
            T.buffer_store(self.total, f32(0), [row])

    def tile(
        self,
        key: Callable[[Expr, Expr], Expr],
        value: Callable[[Expr, Expr], Expr],
        attended: Callable[[Expr], Expr],
    ) -> None:
        """Take in one tile: ``key`` and ``value`` give (token, dim), ``attended(token)`` says which tokens count."""
        axes, rows, head_dim = self.axes, self.rows, self.head_dim
        with axes.lanes(32) as token:
            for row in range(rows):
                T.buffer_store(self.score, f32(0), [row * 32 + token])
            with T.serial(0, head_dim) as dim:
                element = T.Bind(tir.if_then_else(attended(token), key(token, dim), f32(0)))
                for row in range(rows):
                    at = row * 32 + token
                    T.buffer_store(self.score, self.score[at] + self.query[row * head_dim + dim] * element, [at])
            for row in range(rows):
                at = row * 32 + token
                T.buffer_store(self.score, tir.Select(attended(token), self.score[at], f32(MASKED)), [at])
        with axes.lanes(rows) as row:
            self._update_sums(row)
        with axes.lanes(head_dim) as dim:
            for row in range(rows):
                at = row * head_dim + dim
                T.buffer_store(self.output, self.output[at] * self.decay[row], [at])
            with T.serial(0, 32) as token:
                element = T.Bind(tir.if_then_else(attended(token), value(token, dim), f32(0)))
                for row in range(rows):
                    at = row * head_dim + dim
                    T.buffer_store(self.output, self.output[at] + self.score[row * 32 + token] * element, [at])

    def _update_sums(self, row: Expr) -> None:
        T.buffer_store(self.decay, self.peak[row], [row])
        with T.serial(0, 32) as token:
            T.buffer_store(self.peak, tir.max(self.peak[row], self.score[row * 32 + token]), [row])
        T.buffer_store(self.decay, tir.exp2(self.decay[row] - self.peak[row]), [row])
        T.buffer_store(self.total, self.total[row] * self.decay[row], [row])
        with T.serial(0, 32) as token:
            at = row * 32 + token
            weight = tir.exp2(self.score[at] - self.peak[row])
            T.buffer_store(self.score, tir.Select(self.score[at] > f32(MASKED / 2), weight, f32(0)), [at])
            T.buffer_store(self.total, self.total[row] + self.score[at], [row])
