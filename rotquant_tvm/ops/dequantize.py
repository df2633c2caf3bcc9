"""Dequantize: the keys and values of a packed cache, still in the rotated basis."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..errors import FormatError
from ..formats import Codec, KeyLayout, TileLayout
from .axes import Axes
from .sketch_code import sign_value, sketch_element
from .tile_access import code_section, load_gain
from .vector_code import element_value, gain_row

Expr = Any


class TileReader:
    """Expressions for the values of one tile of a cache (rotated basis, float32)."""

    def __init__(self, cache: Any, codec: Codec, layout: TileLayout | KeyLayout, role: str) -> None:
        self.cache, self.codec, self.layout, self.role = cache, codec, layout, role
        self.section = code_section(layout, role)

    def centroid(self, tile: tuple[Expr, ...], token: Expr, dim: Expr) -> Expr:
        """The code's value, before the gain."""

        def code(dim: Expr) -> Expr:
            return self.section.load(lambda i: self.cache[(*tile, i)], token, dim)

        return element_value(self.codec, code, dim)

    def gain(self, tile: tuple[Expr, ...], token: Expr, dim: Expr) -> Expr:
        """The gain that applies to (token, dim), or None for the 16-bit formats."""
        row = gain_row(self.codec.format, dim)
        if row is None:
            return None
        return load_gain(self.layout, self.role, lambda i: self.cache[(*tile, i)], token, row)

    def value(self, tile: tuple[Expr, ...], token: Expr, dim: Expr) -> Expr:
        """The dequantized element. Raises ``FormatError`` for a sketched format, where it takes the whole vector."""
        if self.codec.sketch is not None:
            raise FormatError(
                f"{self.codec.format.name} cannot be read element by element; use dequantize_cache, or score for inner "
                "products"
            )
        return self.feature(tile, token, dim)

    def feature(self, tile: tuple[Expr, ...], token: Expr, dim: Expr) -> Expr:
        """Element ``dim`` of the first ``head_dim`` of ``Codec.features``."""
        gain = self.gain(tile, token, dim)
        value = self.centroid(tile, token, dim)
        return value if gain is None else value * gain

    def sign_feature(self, tile: tuple[Expr, ...], token: Expr, dim: Expr) -> Expr:
        """Element ``head_dim + dim`` of ``Codec.features``: the sketch's (sketched formats only)."""
        load = lambda i: self.cache[(*tile, i)]  # noqa: E731
        norm = load_gain(self.layout, self.role, load, token, 1)
        return sign_value(self.codec, self.section.load(load, token, dim)) * norm


def dequantize_cache(
    codec_k: Codec, codec_v: Codec, kv_heads: int, axes: Axes
) -> tvm.tirx.PrimFunc:
    """Build ``dequantize_cache(cache, lengths[, sketch_k][, sketch_v], k, v)``: keys and values, in the rotated basis.

    Shapes: cache uint32 [batch, kv_heads, tiles, tile_bytes/4]; lengths int32 [batch]; outputs k, v float32
    [batch, kv_heads, 32*tiles, head_dim], zero from ``lengths`` on. A sketched format also needs
    ``Codec.sketch.inverse().data``, float32 [head_dim²]; its loop over d for every element is slow.
    """
    head_dim = codec_k.head_dim
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, tiles = tir.Var("batch", "int64"), tir.Var("tiles", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dequantize_cache")
        T.func_attr({"rotquant.op": "dequantize_cache", "tirx.noalias": True})
        cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, layout.tile_bytes // 4), "uint32"))
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        sketches = {
            role: T.arg(f"sketch_{role}", T.buffer((head_dim * head_dim,), "float32"))
            for role, codec in zip("kv", (codec_k, codec_v), strict=True)
            if codec.sketch is not None
        }
        outputs = [T.arg(n, T.buffer((batch, kv_heads, tiles * 32, head_dim), "float32")) for n in ("k", "v")]
        with axes.blocks(batch * kv_heads * tiles) as block, T.sblock("dequantize"):
            piece = T.axis.spatial(batch * kv_heads * tiles, block)
            T.reads(cache[0:batch, 0:kv_heads, 0:tiles, 0 : layout.tile_bytes // 4], lengths[0:batch])
            T.writes(*(out[0:batch, 0:kv_heads, 0 : tiles * 32, 0:head_dim] for out in outputs))
            b, head = T.Bind(piece // (kv_heads * tiles)), T.Bind(piece // tiles % kv_heads)
            tile = T.Bind(piece % tiles)
            for role, codec, out in zip("kv", (codec_k, codec_v), outputs, strict=True):
                reader = TileReader(cache, codec, layout, role)
                with axes.lanes(32 * head_dim) as index:
                    token, dim = index // head_dim, index % head_dim
                    stored = tile * 32 + token < lengths[b].astype("int64")
                    value = reader.feature((b, head, tile), token, dim)
                    if role in sketches:
                        sign = lambda j, r=reader, t=token: r.sign_feature((b, head, tile), t, j)  # noqa: E731
                        value = value + sketch_element(codec, sketches[role], 0, sign, dim)
                    value = tir.if_then_else(stored, value, tir.const(0, "float32"))
                    T.buffer_store(out, value, [b, head, tile * 32 + token, dim])
    return builder.get()
