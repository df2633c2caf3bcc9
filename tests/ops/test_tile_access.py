"""Tile access: the symbolic addresses are those of the documented layout, for every head dimension."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import tvm.tirx as tir

from rotquant_tvm.formats import HEAD_DIMS, TOKENS, KVFormat, TileLayout
from rotquant_tvm.ops.tile_access import code_section, gain_position, load_gain, u32

from .reference import random_words

OPERATORS = {
    "RShift": operator.rshift,
    "LShift": operator.lshift,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
}
FORMATS = {1: "planar1", 2: "iso2", 3: "rotor3", 4: "hurwitz4", 8: "q8_0", 16: "f16"}


def layout(k_bits: int, v_bits: int, head_dim: int) -> TileLayout:
    return TileLayout(KVFormat.parse(FORMATS[k_bits]), KVFormat.parse(FORMATS[v_bits]), head_dim)


def evaluate(value: tir.PrimExpr) -> int:
    """The value of an integer expression of constants, which TVM does not fold."""
    if isinstance(value, tir.IntImm):
        return int(value)
    if isinstance(value, tir.Cast):
        return evaluate(value.value) % 2 ** int(value.ty.dtype.bits)
    return OPERATORS[type(value).__name__](evaluate(value.a), evaluate(value.b)) % 2**32


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("role", ["k", "v"])
def test_codes_are_loaded_from_where_the_layout_has_them(role, bits):
    rng = np.random.default_rng(bits)
    for head_dim in HEAD_DIMS:
        tile = layout(bits, 3, head_dim) if role == "k" else layout(4, bits, head_dim)
        words = random_words(rng, tile, ())
        codes = dict(zip("kv", tile.unpack(words.view(np.uint8)), strict=True))[role].codes
        section = code_section(tile, role)
        corners = [(0, 0), (31, head_dim - 1), (0, head_dim - 1), (31, 0)]
        drawn = zip(rng.integers(0, TOKENS, 25).tolist(), rng.integers(0, head_dim, 25).tolist(), strict=True)
        for token, dim in [*corners, *drawn]:
            # the branch not taken may point past the tile
            found = section.load(lambda index, w=words: u32(int(w[index % w.size])), token, dim)
            assert evaluate(found) == codes[token, dim], (head_dim, token, dim)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(3, 4), (1, 8), (8, 2), (16, 3)])
def test_gains_are_loaded_from_where_the_layout_has_them(k_bits, v_bits):
    rng = np.random.default_rng(0)
    for head_dim in (32, 80, 128):
        tile = layout(k_bits, v_bits, head_dim)
        words = random_words(rng, tile, ())
        for role, encoded in zip("kv", tile.unpack(words.view(np.uint8)), strict=True):
            for row in range(encoded.gain.shape[-1]):
                for token in range(TOKENS):
                    found = load_gain(tile, role, lambda index, w=words: u32(int(w[index])), token, row)
                    # Cast(float32, reinterpret(float16, bits)): random bits may be NaN
                    assert evaluate(found.value.args[0]) == encoded.gain[token, row].view(np.uint16)


def test_gain_positions_are_a_permutation():
    assert sorted(gain_position(token) for token in range(TOKENS)) == list(range(TOKENS))
