"""The query rows of prefill attention's thread block, on CUDA: where they come from and where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_ops import WARP, Registers, load_words, pack_half2, store_words, u32, warp_sync
from .mma_half_cuda import WarpAttention
from .row_stream_cuda import copy_ahead, share_out

Expr = Any
Place = Callable[[Expr, Expr], Expr]
"""(row, unit): the element of shared memory where dims 8·unit … of a row begin."""


@dataclass(frozen=True)
class QueryRows:
    """The ``rows`` query rows of a block.

    Row i is head (first + i) % group of the kv head's at token (first + i) / group. ``new``: how many tokens of the
    chunk are real; ``seq``: how many it has room for.
    """

    shape: SiteShape
    rows: int
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

    def load(self, shared: Any, q: Any, place: Place, threads: int) -> None:
        """Start copying the rows to shared memory, by so many threads; rows of padding become 0."""
        units = self.shape.head_dim // 8
        for unit in share_out(self.rows * units, self.thread, threads):
            row, part = unit // units, unit % units
            copy_ahead(shared, place(row, part), q, self.index(row, part * 8), self.token(row) < self.new)

    def store(self, shared: Any, out: Any, attention: WarpAttention, mine: Expr, place: Place) -> None:
        """Write the results of this warp's rows, from ``mine`` on, through their places; zeros in rows of padding."""
        lane = self.thread % WARP
        for row in range(2 * attention.row_tiles):
            for block, at in enumerate(attention.output_places(row)[::2]):
                word = pack_half2(attention.output[at], attention.output[at + 1])
                store_words(shared, [place(mine + (row * 8 + lane // 4), block) + lane % 4 * 2], [word], "shared")
        warp_sync()
        units = self.shape.head_dim // 8
        for step in range(attention.row_tiles * units // 2):
            unit = lane + step * WARP
            row, part = mine + unit // units, unit % units
            words = Registers(4)
            load_words(words, 0, shared, [place(row, part)], 4, "shared")
            with T.If(self.token(row) < self.seq.astype("int32")), T.Then():
                real = self.token(row) < self.new
                store_words(out, self.index(row, part * 8), [tir.Select(real, word, u32(0)) for word in words])
