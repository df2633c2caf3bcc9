"""Encode plain vectors into tiles of their own (``KeyLayout``): what builds an index for search."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import TOKENS, Codec, KeyLayout
from .axes import Axes
from .registers import register
from .tile_writer import TileWriter
from .vector_code import EncodeBuffers, emit_encode


def encode_tiles(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``encode_tiles(x, rotation, tiles)``: vector n goes to tile n//32, in place; the last tile's rest stays.

    Shapes: x ``dtype`` [n, head_dim]; rotation float32 (``Codec.coefficients``); tiles uint32 [⌈n/32⌉, tile_bytes/4].
    """
    head_dim, size = codec.head_dim, codec.coefficients.size
    layout = KeyLayout(codec.format, head_dim)
    words = layout.tile_bytes // 4
    n, count = tir.Var("n", "int64"), tir.Var("count", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("encode_tiles")
        T.func_attr({"rotquant.op": "encode_tiles", "tirx.noalias": True})
        x = T.arg("x", T.buffer((n, head_dim), dtype))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        tiles = T.arg("tiles", T.buffer((count, words), "uint32"))
        with axes.blocks(count) as block, T.sblock("tile"):
            tile = T.axis.spatial(count, block)
            T.reads(x[0:n, 0:head_dim], rotation[0:size], tiles[tile, 0:words])
            T.writes(tiles[tile, 0:words])
            buffers = EncodeBuffers(axes, head_dim)
            codes = T.sblock_alloc_buffer((TOKENS * head_dim,), "uint16", scope=axes.scratch)
            zero, full = tir.const(0, "int64"), tir.const(TOKENS, "int64")
            last = register(tir.max(tir.min(n - tile * TOKENS, full), zero))
            target = TileWriter(tiles, (tile,), layout, "k")
            with T.serial(0, last) as token:
                emit_encode(
                    axes,
                    codec,
                    rotation,
                    lambda dim: x[tile * TOKENS + token, dim],
                    lambda dim, code: T.buffer_store(codes, code.astype("uint16"), [token * head_dim + dim]),
                    lambda row, gain: target.store_gain(token, row, gain),
                    buffers,
                )
            target.pack(axes, codes, zero, last, last)
    return builder.get()
