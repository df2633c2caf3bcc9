"""The matrices that prefill attention rotates by: what is declared is what is given, and is the rotation."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import KVFormat, Rotation
from rotquant_tvm.ops.rotation_matrices import key_terms, rotation_arguments, rotation_matrices


def codecs(*names, head_dim=128):
    return [KVFormat.parse(name).codec(head_dim) for name in names]


def declared(pair, dtype):
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("takes")
        T.func_attr({"tirx.noalias": True})
        found = rotation_matrices(*pair, dtype)
    func: tvm.tirx.PrimFunc = builder.get()
    return found, [(tuple(int(n) for n in matrix.shape), str(matrix.dtype)) for matrix in func.params]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "names", [("iso3", "hurwitz2"), ("hurwitz3", "iso2"), ("f16", "planar3"), ("turbo3", "q8_0"), ("f16", "q4_0")]
)
def test_what_is_declared_is_given(names, dtype):
    pair = codecs(*names)
    found, buffers = declared(pair, dtype)
    arguments = rotation_arguments(pair, [codec.rotation for codec in pair], dtype)
    assert [(x.shape, str(x.dtype)) for x in arguments] == buffers
    assert [x is None for x in found] == [codec.rotation.identity for codec in pair]


@pytest.mark.parametrize("family", ["iso", "planar", "rotor", "dense", "turbo", "hurwitz"])
def test_the_terms_of_a_keys_rotation_add_up_to_it(family):
    pair, drawn = codecs(f"{family}3", "f16"), Rotation.draw(family, 128, 77)
    (matrix,) = rotation_arguments(pair, [drawn, pair[1].rotation], "float16")
    total = matrix.reshape(-1, 128, 128).astype(np.float64).sum(0)
    assert np.abs(total - drawn.matrix()).max() < 2.0**-20
    assert np.abs(drawn.matrix().astype(np.float16) - drawn.matrix()).max() < 2.0**-20 or len(matrix) == 256


def test_only_what_float16_does_not_hold_takes_two_terms():
    terms = {name: key_terms(codecs(name)[0], "float16") for name in ("hurwitz3", "iso3", "turbo3", "f16")}
    assert terms == {"hurwitz3": 1, "iso3": 2, "turbo3": 2, "f16": 1}
    assert key_terms(codecs("turbo3", head_dim=64)[0], "float16") == 1
    assert key_terms(codecs("iso3")[0], "float32") == 1


def test_values_have_one_matrix():
    pair = codecs("f16", "iso3")
    (matrix,) = rotation_arguments(pair, [codec.rotation for codec in pair], "float16")
    np.testing.assert_array_equal(matrix, pair[1].rotation.matrix().astype(np.float16))
