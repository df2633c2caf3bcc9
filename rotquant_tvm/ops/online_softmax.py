"""Online softmax over tiles of 32 tokens: the loop body that decode and prefill attention share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .axes import Axes
from .soft_cap import LOG2E as LOG2E
from .soft_cap import soft_cap
from .vector_code import f32, registers

Expr = Any
MASKED = -1.0e30


Store = Callable[[Expr, Expr, Expr], None]


class OnlineSoftmax:
    """State of ``rows`` queries against one stream of keys and values of ``head_dim``.

    Peaks (in units of log2), totals and outputs are unnormalized until the end, so that partial results of several
    streams merge by log-sum-exp; they are private to the lanes that own them. No lane loop both reads and writes one
    shared buffer, since the compiler would want a barrier inside the loop. ``softcap`` bounds the scores (None: not).
    """

    def __init__(self, axes: Axes, rows: int, head_dim: int, softcap: float | None = None) -> None:
        self.axes, self.rows, self.head_dim, self.softcap = axes, rows, head_dim, softcap

        def alloc(size: int) -> Any:
            return T.sblock_alloc_buffer((size,), "float32", scope=axes.scratch)

        self.query = alloc(rows * head_dim)
        self.score, self.weight = alloc(rows * 32), alloc(rows * 32)
        self.decay, self.totals = alloc(rows), alloc(rows)
        self._output = axes.private(head_dim, rows)
        self._peak, self._total = axes.private(rows, 1), axes.private(rows, 1)

    def start(self, load_query: Callable[[Expr, Expr], Expr], scale: float) -> None:
        """Load the queries, times the softmax scale and log2(e), and clear the sums."""
        with self.axes.lanes(self.rows * self.head_dim) as i:
            T.buffer_store(self.query, load_query(i // self.head_dim, i % self.head_dim) * f32(scale * LOG2E), [i])
        with self.axes.lanes(self.head_dim) as dim:
            for row in range(self.rows):
                T.buffer_store(self._output, f32(0), [self.axes.place(dim, row, self.rows)])
        with self.axes.lanes(self.rows) as row:
            T.buffer_store(self._peak, f32(MASKED), [self.axes.place(row, 0, 1)])
            T.buffer_store(self._total, f32(0), [self.axes.place(row, 0, 1)])

    def tile(
        self,
        key: Callable[[Expr, Expr], Expr],
        value: Callable[[Expr, Expr], Expr],
        attended: Callable[[Expr], Expr],
    ) -> None:
        """Take in one tile: ``key`` and ``value`` give (token, dim), ``attended(token)`` says which tokens count."""
        axes, rows, head_dim = self.axes, self.rows, self.head_dim
        with axes.lanes(32) as token:
            sums = registers(rows)
            with T.serial(0, head_dim) as dim:
                element = T.Bind(tir.if_then_else(attended(token), key(token, dim), f32(0)))
                for row in range(rows):
                    T.buffer_store(sums, sums[row] + self.query[row * head_dim + dim] * element, [row])
            for row in range(rows):
                score = tir.Select(attended(token), self._capped(sums[row]), f32(MASKED))
                T.buffer_store(self.score, score, [row * 32 + token])
        with axes.lanes(rows) as row:
            self._update_sums(row)
        with axes.lanes(head_dim) as dim:
            sums = registers(rows)
            with T.serial(0, 32) as token:
                element = T.Bind(tir.if_then_else(attended(token), value(token, dim), f32(0)))
                for row in range(rows):
                    T.buffer_store(sums, sums[row] + self.weight[row * 32 + token] * element, [row])
            for row in range(rows):
                at = axes.place(dim, row, rows)
                T.buffer_store(self._output, self._output[at] * self.decay[row] + sums[row], [at])

    def _capped(self, score: Expr) -> Expr:
        return soft_cap(score, self.softcap, tir.exp2, f32) if self.softcap else score

    def _update_sums(self, row: Expr) -> None:
        mine = self.axes.place(row, 0, 1)
        state = registers(2)
        peak, total = 0, 1
        T.buffer_store(state, self._peak[mine], [peak])
        with T.serial(0, 32) as token:
            T.buffer_store(state, tir.max(state[peak], self.score[row * 32 + token]), [peak])
        with T.serial(0, 32) as token:
            score = T.Bind(self.score[row * 32 + token])
            weight = T.Bind(tir.Select(score > f32(MASKED / 2), tir.exp2(score - state[peak]), f32(0)))
            T.buffer_store(self.weight, weight, [row * 32 + token])
            T.buffer_store(state, state[total] + weight, [total])
        decay = T.Bind(tir.exp2(self._peak[mine] - state[peak]))
        T.buffer_store(self.decay, decay, [row])
        T.buffer_store(self._total, self._total[mine] * decay + state[total], [mine])
        T.buffer_store(self._peak, state[peak], [mine])

    def put_query(self, value: Callable[[Expr], Expr]) -> None:
        """Put ``value(dim)``, times what ``start`` says, in the place of the query (of one row)."""
        with self.axes.lanes(self.head_dim) as dim:
            T.buffer_store(self.query, value(dim), [dim])

    def turn_output(self, scratch: Any, turned: Callable[[Any, Expr], Expr]) -> None:
        """Put ``turned(scratch, dim)`` in the place of the output (of one row), which is in ``scratch`` [head_dim]."""
        with self.axes.lanes(self.head_dim) as dim:
            T.buffer_store(scratch, self._output[self.axes.place(dim, 0, 1)], [dim])
        with self.axes.lanes(self.head_dim) as dim:
            T.buffer_store(self._output, turned(scratch, dim), [self.axes.place(dim, 0, 1)])

    def partial(self, store: Store, store_sums: Store) -> None:
        """Hand over the unnormalized results: ``store(row, dim, output)`` and ``store_sums(row, peak, total)``."""
        with self.axes.lanes(self.head_dim) as dim:
            for row in range(self.rows):
                store(row, dim, self._output[self.axes.place(dim, row, self.rows)])
        with self.axes.lanes(self.rows) as row:
            mine = self.axes.place(row, 0, 1)
            store_sums(row, self._peak[mine], self._total[mine])

    def finish(self, store: Store) -> None:
        """Hand over the normalized output: ``store(row, dim, value)``; 0 where nothing was attended to."""
        with self.axes.lanes(self.rows) as row:
            T.buffer_store(self.totals, self._total[self.axes.place(row, 0, 1)], [row])
        with self.axes.lanes(self.head_dim) as dim:
            for row in range(self.rows):
                total = self.totals[row]
                output = self._output[self.axes.place(dim, row, self.rows)]
                store(row, dim, output / tir.Select(total > f32(0), total, f32(1)))
