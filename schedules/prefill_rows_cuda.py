"""The query rows of prefill attention's thread block, on CUDA: where they are and which tokens they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_ops import WARP, Registers, load_words, pack_half2, scalar, store_words, u32, warp_sync
from .mma_half_cuda import WarpAttention
from .prefill_tiling_cuda import PrefillTiling
from .row_stream_cuda import copy_ahead

Expr = Any
Seen = Callable[[int, Expr], Expr]
"""Whether the lane's row of a number sees a token, counted from the stage's first."""


@dataclass(frozen=True)
class QueryRows:
    """The query rows of a block: row i is head (first + i) % group of the kv head's at token (first + i) / group.

    ``new``: how many tokens of the chunk are real; ``seq``: how many it has room for.
    """

    shape: SiteShape
    tiling: PrefillTiling
    thread: Expr
    where: tuple[Expr, Expr]
    first: Expr
    seq: Expr
    new: Expr

    def token(self, row: Expr) -> Expr:
        """The token of a row."""
        return tir.truncdiv(self.first + row, self.shape.group)

    def index(self, row: Expr, dim: Expr) -> list[Expr]:
        """Where a row's elements stand in the queries and outputs."""
        b, head = self.where
        group = self.shape.group
        return [b, self.token(row), head * group + tir.truncmod(self.first + row, group), dim]

    def load(self, shared: Any, q: Any) -> None:
        """Start copying the rows to the start of shared memory; rows of padding become 0."""
        tiling = self.tiling
        units = tiling.head_dim // 8
        for step in range(tiling.rows * units // tiling.threads):
            unit = self.thread + step * tiling.threads
            row, part = unit // units, unit % units
            copy_ahead(shared, row * tiling.pitch + part * 8, q, self.index(row, part * 8), self.token(row) < self.new)

    def store(self, shared: Any, out: Any, attention: WarpAttention) -> None:
        """Write the results, through this warp's rows of shared memory; zeros in rows of padding."""
        tiling, lane = self.tiling, self.thread % WARP
        start = scalar(self.thread // WARP * (16 * tiling.row_tiles))
        for row in range(2 * tiling.row_tiles):
            at = (start + (row * 8 + lane // 4)) * tiling.pitch + lane % 4 * 2
            for block, place in enumerate(attention.output_places(row)[::2]):
                word = pack_half2(attention.output[place], attention.output[place + 1])
                store_words(shared, [at + block * 8], [word], "shared")
        warp_sync()
        units = tiling.head_dim // 8
        for step in range(tiling.row_tiles * units // 2):
            unit = lane + step * WARP
            row, dim = start + unit // units, unit % units * 8
            words = Registers(4)
            load_words(words, 0, shared, [row * tiling.pitch + dim], 4, "shared")
            with T.If(self.token(row) < self.seq.astype("int32")), T.Then():
                real = self.token(row) < self.new
                store_words(out, self.index(row, dim), [tir.Select(real, word, u32(0)) for word in words])


class Sight:
    """Which tokens a warp's rows see: none that come after a row's own, and with a window no others than the newest.

    Distances are counted from the chunk's first token: a row's token less ``window`` and more is hidden.
    """

    def __init__(self, rows: QueryRows, lane: Expr, warp: Expr) -> None:
        size = 16 * rows.tiling.row_tiles
        self.rows, self.lane, self.mine = rows, lane, warp * size
        self.window, self.tokens = rows.shape.window, rows.tiling.tokens
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
        count = 2 * self.rows.tiling.row_tiles if stop is None or self.window else 0
        above = [scalar(self.own(row) - start) for row in range(count)]

        def see(row: int, token: Expr) -> Expr:
            before = token <= above[row] if stop is None else token < stop
            return before if self.window is None else tir.all(before, token > above[row] - self.window)

        return see
