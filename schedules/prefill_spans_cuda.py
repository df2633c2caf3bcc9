"""Which tokens the query rows of a thread block see in prefill attention, on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.ops.segments import Segments

from .cuda_ops import WARP, i32, scalar
from .mma_half_cuda import WarpAttention
from .prefill_rows_cuda import QueryRows
from .row_stream_cuda import KeptRows

Expr = Any
Seen = Callable[[int, Expr], Expr]
"""Whether the lane's row of a number sees a token, counted from the stage's first."""


class Sight:
    """Which tokens a warp's rows see: none that come after a row's own, and with a window no others than the newest.

    Distances are counted from the chunk's first token: a row's token less ``window`` and more is hidden.
    """

    def __init__(self, rows: QueryRows, mine: Expr, size: int, tokens: int) -> None:
        """``mine``, ``size``: the warp's first row and how many it has; ``tokens``: of a stage."""
        self.rows, self.lane, self.mine, self.size = rows, rows.thread % WARP, mine, size
        self.window, self.tokens = rows.shape.window, tokens
        self.first, self.last = scalar(rows.token(self.mine)), scalar(rows.token(self.mine + (size - 1)))

    def own(self, row: int) -> Expr:
        """The token of a row of the lane; worked out again each time, since registers are scarce."""
        return self.rows.token(self.mine + (8 * row + self.lane // 4))

    def limited(self, start: Expr, stop: Expr | None) -> Expr:
        """Whether some row does not see all tokens of a stage.

        The stage's first token is ``start`` tokens behind the chunk's first, its tokens from ``stop`` on (counted in
        the stage) are none; None where the stage is of the chunk, of which no row sees what comes after its token.
        """
        end = start + (self.tokens - 1) > self.first if stop is None else stop < self.tokens
        return end if self.window is None else tir.any(end, start <= self.last - self.window)

    def seen(self, start: Expr, stop: Expr | None) -> Seen:
        """Which tokens of that stage a row sees."""
        count = self.size // 8 if stop is None or self.window else 0
        above = [scalar(self.own(row) - start) for row in range(count)]

        def see(row: int, token: Expr) -> Expr:
            before = token <= above[row] if stop is None else token < stop
            return before if self.window is None else tir.all(before, token > above[row] - self.window)

        return see


class TokenSpans:
    """The spans of tokens that a block reads: packed ones and 16-bit rows, the policy's and the chunk's own.

    ``past`` tokens precede the chunk. Blocks of padding read none. ``first_tile``, ``kept_begin`` and ``begin`` are
    where the three begin; ``packed``, ``kept.stop`` and ``stop`` where they end.
    """

    def __init__(self, rows: QueryRows, segments: Segments, past: Expr) -> None:
        self.rows, self.past, self.policy = rows, past, segments.policy
        some = rows.token(i32(0)) < rows.new
        packed = scalar(segments.packed(rows.where[0], past))
        self.packed = scalar(tir.Select(some, packed, i32(0)))
        self.kept = self._kept(segments, packed, some) if self.policy.segmented else None
        last = rows.token(i32(rows.rows - 1))
        self.stop = scalar(tir.Select(some, tir.min(last + 1, rows.new), i32(0)))
        self.begin, self.kept_begin, self.first_tile = i32(0), i32(0), i32(0)
        if rows.shape.window:
            self._skip_what_no_row_sees()

    def _kept(self, segments: Segments, packed: Expr, some: Expr) -> KeptRows:
        policy = self.policy
        held = scalar(tir.min(self.past, i32(policy.sinks)))
        ring = tir.max(self.past - policy.sinks - packed, 0) if policy.ring else i32(0)
        stop = scalar(tir.Select(some, held + ring, i32(0)))
        return KeptRows(segments.plain, self.rows.where, policy, stop, held, packed)

    def _skip_what_no_row_sees(self) -> None:
        oldest = scalar(self.rows.token(i32(0)) - (self.rows.shape.window - 1))
        self.first_tile = scalar(tir.max(self.past + oldest - self.policy.sinks, 0) // TOKENS)
        self.begin = scalar(tir.max(oldest, i32(0)))
        if self.kept:
            begin = tir.max(self.kept.stop + oldest, self.kept.held)
            self.kept_begin = scalar(tir.Select(self.past + oldest < self.kept.held, i32(0), begin))

    @property
    def some_past(self) -> Expr:
        """Whether anything before the chunk is read."""
        packed = self.packed > self.first_tile * TOKENS
        return tir.any(packed, self.kept.stop > self.kept_begin) if self.kept else packed

    def hide_packed(self, attention: WarpAttention, sight: Sight, first: Expr) -> None:
        """Mask the scores of a stage of packed tokens; ``first``: the number of its first one behind the sinks."""
        start, stop = scalar(first + self.policy.sinks - self.past), scalar(self.packed - first)
        with T.If(sight.limited(start, stop)), T.Then():
            attention.hide(sight.seen(start, stop), self.rows.thread % WARP)

    def hide_kept(self, attention: WarpAttention, sight: Sight, kept: KeptRows, first: Expr) -> None:
        """Mask the scores of a stage of rows that the policy keeps; ``first``: the number of its first one."""
        lane = self.rows.thread % WARP
        start, stop = scalar(first - kept.stop), scalar(kept.stop - first)
        limited = sight.limited(start, stop)
        if sight.window is None:
            with T.If(limited), T.Then():
                attention.hide(sight.seen(start, stop), lane)
            return
        # Between the sinks and the rows that follow them in the numbering, there are the packed tokens.
        sinks = scalar(first - self.past)
        with T.If(tir.any(limited, tir.all(first < kept.held, sinks <= sight.last - sight.window))), T.Then():
            near, far = sight.seen(start, stop), sight.seen(sinks, stop)
            left = scalar(kept.held - first)
            attention.hide(lambda row, token: tir.if_then_else(token < left, far(row, token), near(row, token)), lane)

    def hide_chunk(self, attention: WarpAttention, sight: Sight, first: Expr) -> None:
        """Mask the scores of a stage of the chunk's rows; ``first``: the token of its first one."""
        with T.If(sight.limited(first, None)), T.Then():
            attention.hide(sight.seen(first, None), self.rows.thread % WARP)
