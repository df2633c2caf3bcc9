"""Where a thread stands in decode attention, on CUDA: its block's stream and split, its warp and lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir

from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_ops import i32

Expr = Any


@dataclass(frozen=True)
class DecodePlace:
    """A *stream* is up to eight query heads of a kv head of a sequence; a block serves one of its ``splits``.

    ``row_blocks``: how many of these, the last ones, have rows in 16 bits instead of tiles; if none, the others share
    the rows. ``b``: the sequence. ``head``: the kv head. ``head_block``: which of the kv head's streams.
    ``stream``: the stream's number among all. ``rows``: its query heads. All expressions int32.
    """

    shape: SiteShape
    rows: int
    warps: int
    b: Expr
    head: Expr
    head_block: Expr
    stream: Expr
    split: Expr
    splits: Expr
    row_blocks: Expr
    thread: Expr
    lane: Expr
    warp: Expr

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and dims of the stream's queries, and of its sums."""
        return self.rows, self.shape.head_dim

    @property
    def threads(self) -> tuple[Expr, int]:
        """The thread's number, and how many the block has."""
        return self.thread, 32 * self.warps

    @property
    def step(self) -> Expr:
        """Warps that share the stream's tiles."""
        return self.tile_splits * self.warps

    @property
    def tile_splits(self) -> Expr:
        """Blocks that share the stream's tiles."""
        return self.splits - self.row_blocks

    @property
    def has_tiles(self) -> Expr:
        """Whether the block is one of these."""
        return self.split < self.tile_splits

    @property
    def narrow(self) -> bool:
        """Whether the tensor cores' eight columns hold the queries twice."""
        return self.rows <= 4

    @property
    def lane_row(self) -> Expr:
        """The query row that the lane's scores are of."""
        return tir.min(self.lane // 4 % 4 if self.narrow else self.lane // 4, i32(self.rows - 1))

    def query_head(self, row: Expr) -> Expr:
        """The query head of a row; rows beyond the group repeat its last head."""
        return self.head * self.shape.group + tir.min(self.head_block * self.rows + row, i32(self.shape.group - 1))

    def is_head(self, row: Expr) -> Expr:
        """Whether a row has a query head of its own."""
        return self.head_block * self.rows + row < self.shape.group
