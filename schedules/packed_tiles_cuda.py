"""Packed tiles, the centres of their keys and the formats' tables in shared memory, on CUDA: what unpacking reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.ops.segments import Segments

from .cuda_ops import ptx, scalar
from .packed_half_cuda import HalfFormat
from .row_stream_cuda import copy_ahead, share_out
from .trellis_half_cuda import store_table

Expr = Any


@dataclass(frozen=True)
class PackedTiles:
    """Some neighbouring tiles of a sequence and head, ``where``; the block's ``threads`` copy them and fill the tables.

    ``tiles``: how many at once. ``raw_start``, ``centre_start``, ``table_start``: elements of ``shared``, of 16 bits.
    """

    segments: Segments
    formats: tuple[HalfFormat, HalfFormat]
    shared: Any
    where: tuple[Expr, Expr]
    thread: Expr
    threads: int
    tiles: int
    raw_start: Expr
    centre_start: Expr
    table_start: int

    @property
    def key_factor(self) -> float:
        """What scores lack."""
        return self.formats[0].factor

    @property
    def value_octaves(self) -> float:
        """log2 of what values lack."""
        return log2(self.formats[1].factor)

    @property
    def head_dim(self) -> int:
        """The head dimension."""
        return self.segments.layout.head_dim

    @property
    def centred(self) -> bool:
        """Whether keys stand off centres."""
        return bool(self.segments.policy.center)

    @property
    def late_gains(self) -> bool:
        """Whether scores are multiplied by keys' gains, and not keys.

        Keys are grid points then, which float16 holds exactly: scores lose nothing but what queries do. A key that has
        several gains, or stands off a centre, is a sum that must be rounded.
        """
        return self.formats[0].gains == 1 and not self.centred

    def table(self, role: int) -> int:
        """The element of shared memory where the table of K or V begins."""
        return self.table_start + (len(self.formats[0].table) if role else 0)

    def store_tables(self) -> None:
        """Fill the tables."""
        for role, form in enumerate(self.formats):
            if form.table:
                store_table(self.shared, self.table(role), form.table, self.thread, self.threads)

    def copy(self, first: Expr, stop: Expr) -> None:
        """Start copying the tiles from ``first`` on, as far as there are before ``stop``, with their centres."""
        units = self.segments.layout.tile_bytes // 16
        stored = scalar(stop - first)
        for unit in share_out(self.tiles * units, self.thread, self.threads):
            with T.If(unit < stored * units), T.Then():
                index = [*self.where, first + unit // units, unit % units * 4]
                copy_ahead(self.shared, self.raw_start + unit * 8, self.segments.cache, index)
        if self.centred:
            self._copy_centres(first, stored)

    def _copy_centres(self, first: Expr, stored: Expr) -> None:
        """Copy the centre of each tile, 4 bytes at a time: its size is no multiple of more."""
        words, block = centre_words(self.head_dim), self.segments.policy.center // TOKENS
        for unit in share_out(self.tiles * words, self.thread, self.threads):
            with T.If(unit // words < stored), T.Then():
                source = self.segments.centre.ptr_to([*self.where, (first + unit // words) // block, unit % words])
                ptx("cp.async.ca.shared.global", self.shared.ptr_to([self.centre_start + unit * 2]), source, 4)


def tiles_of(tokens: Expr) -> Expr:
    """Tiles that so many tokens take."""
    return tir.truncdiv(tokens + (TOKENS - 1), TOKENS)
