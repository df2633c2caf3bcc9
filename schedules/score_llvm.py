"""Scores of queries against packed vectors on CPUs: the vector form of ``ops.score``.

A tile is unpacked once for a block of queries, in the order of ``tile_values_llvm``: lane (g, t) holds a quarter of the
dims of one token. So queries are replicated over g to match, products accumulate per lane, and the four lanes of a
token are summed at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import KeyLayout, SignCodebook
from rotquant_tvm.ops.score import ScoreShape, feature_count
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.tile_access import CodeSection

from .packed_source_llvm import tile_values
from .tile_values_llvm import LoadWords, TileGains, TileValues
from .vector_ops import LANES, lanes, pick, register, splat, sum_of_fours

Expr = Any
ROWS = 64
"""Queries per task: a tile is unpacked once for so many."""
TILES = 64
"""Tiles per task."""
BLOCK = 4
"""Queries whose sums are in registers at a time."""


@dataclass(frozen=True)
class _Signs(TileValues):
    """Unpacks the signs of a sketch, as the values they stand for."""

    @property
    def section(self) -> CodeSection:
        return super().section.plane

    def _lookup(self, code: Expr, table: Any) -> Expr:
        scale = float(SignCodebook(self.codec.head_dim).scale)
        return tir.Select((code & splat(1, "uint32")) == splat(0, "uint32"), splat(-scale), splat(scale))


def score_llvm(shape: ScoreShape, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Build the kernel; parameters and results are those of ``ops.score``."""
    codec, head_dim = shape.codec(), shape.head_dim
    features = feature_count(codec)
    layout = KeyLayout(codec.format, head_dim)
    words = layout.tile_bytes // 4
    queries, tiles = tir.Var("queries", "int64"), tir.Var("tiles", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("score")
        T.func_attr({OP_ATTR: "score", "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.arg("q", T.buffer((queries, features), "float32"))
        packed = T.arg("tiles", T.buffer((tiles, words), "uint32"))
        out = T.arg("out", T.buffer((queries, tiles * 32), "float32"))
        with T.sblock("all"):
            T.reads(q[0:queries, 0:features], packed[0:tiles, 0:words])
            T.writes(out[0:queries, 0 : tiles * 32])
            parts = (tiles + (TILES - 1)) // TILES
            with T.parallel(0, (queries + (ROWS - 1)) // ROWS * parts) as task:
                first = task // parts * ROWS
                rows = tir.min(queries - first, tir.const(ROWS, "int64"))
                core = _Core(features, head_dim)
                core.load_queries(q, first, rows)
                stages = [_Stage(tile_values(codec, layout, "k", target), 0)]
                if codec.sketch is not None:
                    stages.append(_Stage(_Signs(codec, layout, "k", target), 1))
                scratch = T.alloc_buffer((max(stage.values.scratch_words for stage in stages) * 32,), "uint32")
                tables = [stage.values.table() for stage in stages]
                with T.serial(0, tir.min(tiles - task % parts * TILES, tir.const(TILES, "int64"))) as step:
                    tile = task % parts * TILES + step
                    load = lambda at, tile=tile: packed[tile, lanes(at)]  # noqa: E731
                    for index, (stage, table) in enumerate(zip(stages, tables, strict=True)):
                        stage.unpack(load, table, scratch, core)
                        core.score(rows, index * head_dim)
                        _store(core, out, (first, rows, tile), index > 0)
    return builder.get()


@dataclass(frozen=True)
class _Stage:
    """One part of the features of a tile: its values, and which of a vector's gains scales them."""

    values: Any
    row: int

    def unpack(self, load: LoadWords, table: Any, scratch: Any, core: _Core) -> None:
        codec, gains = self.values.codec, TileGains(self.values.layout, "k")
        self.values.unpack(load, table, scratch, core.keys)
        if codec.codebook is not None:
            gains.in_token_order(load, core.gains, self.values.unit, self.row)
            return
        if codec.format.codebook == "linear":
            gains.scale_blocks(load, codec.head_dim, core.keys)
        for s in range(2):
            T.buffer_store(core.gains, splat(1.0), [lanes(LANES * s)])


class _Core:
    """Scratch and loops for a block of queries; create it where its buffers should be allocated."""

    def __init__(self, features: int, head_dim: int) -> None:
        self.features, self.head_dim = features, head_dim
        self.query = T.alloc_buffer((ROWS * features * 4,), "float32")
        self.keys = T.alloc_buffer((head_dim * 32,), "float32")
        self.sums = T.alloc_buffer((ROWS * 8 * LANES,), "float32")
        self.gains = T.alloc_buffer((2 * LANES,), "float32")

    def load_queries(self, q: Any, first: Expr, rows: Expr) -> None:
        """Spread queries ``first`` … over the lanes; the rows up to a whole block count as 0."""
        with T.serial(0, _blocks(rows) * BLOCK) as row, T.serial(0, self.features // 16) as sixteen:
            part = register()
            T.buffer_store(part, splat(0.0), [lanes(0)])
            with T.If(row < rows), T.Then():
                T.buffer_store(part, q[first + row, lanes(sixteen * 16)], [lanes(0)])
            for e in range(4):
                value = pick([part[lanes(0)]], lambda k, e=e: 4 * (k % 4) + e)
                slot = (row * (self.features // 16) + sixteen) * 4 + e
                T.buffer_store(self.query, value, [lanes(slot * LANES)])

    def score(self, rows: Expr, feature: int) -> None:
        """Sums of the tile in ``keys`` with the queries' features from ``feature`` on, still apart by lane."""
        quarter = self.head_dim // 4
        with T.serial(0, 4) as octet, T.serial(0, _blocks(rows)) as block:
            sums = register(2 * BLOCK)
            for n in range(2 * BLOCK):
                T.buffer_store(sums, splat(0.0), [lanes(LANES * n)])
            with T.serial(0, quarter) as step:
                for r in range(BLOCK):
                    slot = (block * BLOCK + r) * (self.features // 4) + (feature // 4 + step)
                    query = self.query[lanes(slot * LANES)]
                    for s in range(2):
                        at = lanes(LANES * (2 * r + s))
                        key = self.keys[lanes(((octet * quarter + step) * 2 + s) * LANES)]
                        T.buffer_store(sums, sums[at] + query * key, [at])
            for r in range(BLOCK):
                for s in range(2):
                    slot = (block * BLOCK + r) * 8 + octet * 2 + s
                    T.buffer_store(self.sums, sums[lanes(LANES * (2 * r + s))], [lanes(slot * LANES)])


def _blocks(rows: Expr) -> Expr:
    return (rows + (BLOCK - 1)) // BLOCK


def _store(core: _Core, out: Any, where: tuple[Expr, Expr, Expr], add: bool) -> None:
    """Sum the lanes of each token, scale by its gain, and store (or add) the scores of one tile."""
    first, rows, tile = where
    with T.serial(0, rows) as row:
        for s in range(2):
            at = [first + row, lanes(tile * 32 + LANES * s)]
            value = sum_of_fours(core.sums, row * 8 * LANES + 64 * s) * core.gains[lanes(LANES * s)]
            T.buffer_store(out, value + out[tuple(at)] if add else value, at)
