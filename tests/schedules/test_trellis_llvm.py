"""Unpacking a tile of a trellis format into vectors: every element at its place, with byte permutes and without."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.tile_values_llvm import slot_k, slot_v
from rotquant_tvm.schedules.trellis_llvm import TrellisValues
from rotquant_tvm.schedules.vector_ops import lanes
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.target.codegen import target_has_features
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import KVFormat, TileLayout
from rotquant_tvm.target import host_target

CPUS = {"host": None, "x86-64-v4": "avx512f", "x86-64-v3": "avx2"}


def target_of(cpu):
    """The llvm target of a CPU that this machine is one of."""
    if cpu == "host":
        return host_target()
    if not target_has_features(CPUS[cpu], host_target()):
        pytest.skip(f"this CPU is no {cpu}")
    return Target({"kind": "llvm", "mcpu": cpu})


def unpack_kernel(codecs, layout, role, target):
    """``unpack(tile, out)``: uint32 [tile_bytes/4] -> float32 [32*head_dim] in the order of the scratch vectors."""
    head_dim, size = layout.head_dim, layout.tile_bytes // 4
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("unpack")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        tile, out = T.arg("tile", T.buffer((size,), "uint32")), T.arg("out", T.buffer((32 * head_dim,), "float32"))
        values = TrellisValues(codecs["kv".index(role)], layout, role, target)
        table, words = values.table(), T.alloc_buffer((values.scratch_words * 32,), "uint32")
        values.unpack(lambda first: tile[lanes(first)], table, words, out)
    mod = tvm.IRModule({"kernel": builder.get().with_attr("global_symbol", "kernel")})
    return tvm.compile(mod, target)["kernel"], values.unit


def in_scratch_order(values, role):
    """Values [32, d] in the order that ``tile_values_llvm`` documents."""
    head_dim = values.shape[1]
    out = np.full((2 * head_dim, 16), np.nan)
    g, t = np.divmod(np.arange(16), 4)
    for group in range(head_dim // 8):
        for half in range(2):
            for e in range(4):
                for s in range(2):
                    if role == "k":
                        octet, h = divmod(2 * group + half, head_dim // 16)
                        out[slot_k(group, half, e, s)] = values[8 * octet + 4 * s + g, 16 * h + 4 * t + e]
                    else:
                        pair, x = divmod(group, 2)
                        token, dim = 16 * x + 8 * (e // 2) + 2 * t + e % 2, 16 * pair + 8 * half + 4 * s + g
                        out[slot_v((pair, x), half, e, s)] = values[token, dim]
    assert not np.isnan(out).any()
    return out.reshape(-1)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(("bits", "head_dim"), [(2, 64), (2, 80), (3, 32), (3, 80), (3, 128), (4, 48), (4, 256)])
def test_every_element_has_its_value(cpu, bits, head_dim):
    rng = np.random.default_rng(bits * head_dim)
    codecs = [KVFormat.parse(f"planar{bits}+tcq").codec(head_dim, seed) for seed in range(2)]
    layout = TileLayout(codecs[0].format, codecs[1].format, head_dim)
    tile = rng.integers(0, 2**32, layout.tile_bytes // 4, dtype=np.uint32)
    target = target_of(cpu)
    for role, codec, encoded in zip("kv", codecs, layout.unpack(tile.view(np.uint8)), strict=True):
        kernel, unit = unpack_kernel(codecs, layout, role, target)
        out = tvm.runtime.tensor(np.full(32 * head_dim, np.nan, np.float32))
        kernel(tvm.runtime.tensor(tile), out)
        expected = in_scratch_order(codec.codebook.decode(encoded.codes), role)
        np.testing.assert_allclose(out.numpy() * unit, expected, rtol=1e-6)
