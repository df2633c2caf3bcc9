"""Unpacking a tile into bytes: every element's grid value at its place, on every kind of CPU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.integer_stream_llvm import byte_source
from rotquant_tvm.schedules.tile_bytes_llvm import GRID_OFFSET
from rotquant_tvm.schedules.vector_ops import lanes
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import KVFormat, TileLayout

from .byte_targets import BYTE_CPUS, byte_target


def unpack_kernel(codecs, layout, target):
    """``unpack(tile, keys, values)``: uint32 [tile_bytes/4] -> uint32 [8*head_dim] each."""
    size = 8 * layout.head_dim
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("unpack")
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True, "tirx.is_scheduled": True})
        tile = T.arg("tile", T.buffer((layout.tile_bytes // 4,), "uint32"))
        outputs = [T.arg(name, T.buffer((size + 16,), "uint32")) for name in ("keys", "values")]
        for codec, role, out in zip(codecs, "kv", outputs, strict=True):
            source = byte_source(codec, layout, role, target)
            words = T.alloc_buffer((source.scratch_words * 32,), "uint32")
            source.unpack_bytes(lambda first: tile[lanes(first)], source.table(), words, out, 16)
    return tvm.compile(tvm.IRModule({"kernel": builder.get()}), target)["kernel"]


def in_order(values, role):
    """Values [32, d] as bytes in the order that ``tile_bytes_llvm`` documents."""
    head_dim = values.shape[1]
    group, half, s, lane, e = np.indices((head_dim // 8, 2, 2, 16, 4))
    g, t = lane // 4, lane % 4
    if role == "k":
        octet, h = np.divmod(2 * group + half, head_dim // 16)
        token, dim = 8 * octet + 4 * s + g, 16 * h + 4 * t + e
    else:
        pair, x = np.divmod(group, 2)
        token, dim = 16 * x + 8 * (e // 2) + 2 * t + e % 2, 16 * pair + 8 * half + 4 * s + g
    return values[token, dim].reshape(-1)


CASES = [
    ("hurwitz3/rotor1", 80, "permutes"),
    ("turbo4/hurwitz2", 64, "permutes"),
    ("planar1/rotor3", 48, "whole"),
    ("hurwitz2/rotor4", 80, "whole"),
    ("hurwitz3/planar4", 80, "halves"),
    ("turbo2/planar1", 64, "halves"),
    ("planar2+tcq/hurwitz3+tcq", 80, "permutes"),
]
EVERY = [
    pytest.param(f"planar{a}/planar{b}", head_dim, kind, marks=pytest.mark.full)
    for a, b in ((1, 2), (3, 4))
    for head_dim in (32, 112, 256)
    for kind in BYTE_CPUS
]


@pytest.mark.parametrize(("pair", "head_dim", "kind"), [*CASES, *EVERY])
def test_every_element_has_its_value(pair, head_dim, kind):
    target = byte_target(kind)
    codecs = [KVFormat.parse(name).codec(head_dim, seed) for seed, name in enumerate(pair.split("/"))]
    layout = TileLayout(codecs[0].format, codecs[1].format, head_dim)
    tile = np.random.default_rng(head_dim).integers(0, 2**32, layout.tile_bytes // 4, dtype=np.uint32)
    outputs = [tvm.runtime.tensor(np.zeros(8 * head_dim + 16, np.uint32)) for _ in range(2)]
    unpack_kernel(codecs, layout, target)(tvm.runtime.tensor(tile), *outputs)
    for role, codec, encoded, out in zip("kv", codecs, layout.unpack(tile.view(np.uint8)), outputs, strict=True):
        values = np.rint(codec.codebook.decode(encoded.codes) / codec.codebook.scale).astype(int) + GRID_OFFSET
        found = out.numpy().view(np.uint8)
        assert not found[:64].any()
        np.testing.assert_array_equal(found[64:], in_order(values, role))
