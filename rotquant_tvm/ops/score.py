"""Score: inner products of queries with packed vectors, read from their tiles without decoding a vector."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import TOKENS, Codec, KeyLayout, KVFormat
from .axes import Axes
from .dequantize import TileReader
from .registers import f32, registers
from .sketch_code import sketch_element
from .vector_code import emit_rotation

SCORE_ATTR = "rotquant.score"


@dataclass(frozen=True)
class ScoreShape:
    """What a score kernel is specialized on; the kernel carries it as an attribute."""

    format: str
    head_dim: int

    def codec(self) -> Codec:
        """A codec of this shape; its rotation has the right structure but is not the one in use."""
        return KVFormat.parse(self.format).codec(self.head_dim)

    @staticmethod
    def of(func: tvm.tirx.PrimFunc) -> ScoreShape | None:
        """Read the shape that a function carries, if any."""
        text = func.attrs.get(SCORE_ATTR) if func.attrs is not None else None
        return None if text is None else ScoreShape(**json.loads(str(text)))


def feature_count(codec: Codec) -> int:
    """How many numbers stand for a query: the last axis of ``Codec.query_features``."""
    return codec.head_dim if codec.sketch is None else 2 * codec.head_dim


def query_features(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``query_features(q, rotation, features)``: ``Codec.query_features``.

    Shapes: q ``dtype`` [n, head_dim]; rotation float32 (``Codec.coefficients``); features float32 [n, head_dim], of a
    sketched format [n, 2·head_dim].
    """
    head_dim, size, count = codec.head_dim, codec.coefficients.size, feature_count(codec)
    n = tir.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("query_features")
        T.func_attr({"rotquant.op": "query_features", "tirx.noalias": True})
        q = T.arg("q", T.buffer((n, head_dim), dtype))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        features = T.arg("features", T.buffer((n, count), "float32"))
        with axes.blocks(n) as block, T.sblock("row"):
            row = T.axis.spatial(n, block)
            T.reads(q[row, 0:head_dim], rotation[0:size])
            T.writes(features[row, 0:count])
            buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(2)]
            with axes.lanes(head_dim) as dim:
                T.buffer_store(buffers[0], f32(q[row, dim]), [dim])
            rotated = emit_rotation(axes, codec.rotation.structure, head_dim, rotation, *buffers)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(features, rotated[dim], [row, dim])
            if codec.sketch is not None:
                first = codec.rotation.data.size
                with axes.lanes(head_dim) as dim:
                    value = sketch_element(codec, rotation, first, lambda j: rotated[j], dim)
                    T.buffer_store(features, value, [row, head_dim + dim])
    return builder.get()


def score(codec: Codec, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``score(q, tiles, out)``: out[i, 32·t + j] is the inner product of query i with vector j of tile t.

    Shapes: q float32 [queries, features], made by ``query_features``; tiles uint32 [tiles, tile_bytes/4], laid out as
    ``KeyLayout`` says; out float32 [queries, 32·tiles]. The estimator is the format's: with a sketch it is unbiased, as
    it is with the ip gain.
    """
    head_dim, count = codec.head_dim, feature_count(codec)
    layout = KeyLayout(codec.format, head_dim)
    words = layout.tile_bytes // 4
    queries, tiles = tir.Var("queries", "int64"), tir.Var("tiles", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("score")
        shape = json.dumps(asdict(ScoreShape(codec.format.name, head_dim)))
        T.func_attr({"rotquant.op": "score", SCORE_ATTR: shape, "tirx.noalias": True})
        q = T.arg("q", T.buffer((queries, count), "float32"))
        packed = T.arg("tiles", T.buffer((tiles, words), "uint32"))
        out = T.arg("out", T.buffer((queries, tiles * TOKENS), "float32"))
        with axes.blocks(tiles) as block, T.sblock("tile"):
            tile = T.axis.spatial(tiles, block)
            T.reads(q[0:queries, 0:count], packed[tile, 0:words])
            T.writes(out[0:queries, 0 : tiles * TOKENS])
            values = T.sblock_alloc_buffer((TOKENS * head_dim,), "float32", scope=axes.scratch)
            reader = TileReader(packed, codec, layout, "k")
            for stage, feature in enumerate((reader.feature, reader.sign_feature)[: count // head_dim]):
                _emit_values(axes, head_dim, values, lambda token, dim, f=feature: f((tile,), token, dim))
                with T.serial(0, queries) as row, axes.lanes(TOKENS) as token:
                    total = registers(1)
                    with T.serial(0, head_dim) as dim:
                        product = q[row, stage * head_dim + dim] * values[token * head_dim + dim]
                        T.buffer_store(total, total[0] + product, [0])
                    at = [row, tile * TOKENS + token]
                    T.buffer_store(out, total[0] + out[tuple(at)] if stage else total[0], at)
    return builder.get()


def _emit_values(axes: Axes, head_dim: int, values: Any, feature: Any) -> None:
    with axes.lanes(TOKENS * head_dim) as index:
        T.buffer_store(values, feature(index // head_dim, index % head_dim), [index])
