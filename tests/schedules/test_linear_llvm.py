from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rotquant_tvm.schedules.linear_llvm import PackedLinear, pack_weight, packed_linear
from rotquant_tvm.schedules.vector_target import VectorTarget

RNG = np.random.default_rng(0)


@settings(max_examples=50, deadline=None)
@given(out=st.integers(1, 100), features=st.integers(1, 40), tile=st.sampled_from([1, 8, 32]))
def test_packing_is_a_transposed_padding(out, features, tile):
    weight = RNG.standard_normal((out, features)).astype("float32")
    packed = pack_weight(weight, tile)
    assert packed.shape == (-(-out // tile), features, tile) and packed.flags.c_contiguous
    flat = packed.transpose(0, 2, 1).reshape(-1, features)
    np.testing.assert_array_equal(flat[:out], weight)
    assert not flat[out:].any()


def arrays(spec: PackedLinear, leading: tuple[int, ...]):
    """x, one weight per layer, one bias per layer (or None), residual (or None); scaled for sums near 1."""
    x = RNG.standard_normal((*leading, spec.in_features)) / np.sqrt(spec.in_features)
    weights = [
        RNG.standard_normal((n, spec.in_features)).astype(spec.weight_dtype) for n in spec.out_features
    ]
    biases = [
        RNG.standard_normal(n).astype(spec.output_dtype) if has else None
        for n, has in zip(spec.out_features, spec.bias, strict=True)
    ]
    residual = RNG.standard_normal((*leading, spec.out_features[0])).astype(spec.output_dtype)
    return x.astype(spec.input_dtype), weights, biases, residual if spec.residual else None


def check(run, target, spec, leading, tolerance):
    x, weights, biases, residual = arrays(spec, leading)
    packed = np.concatenate([pack_weight(w, spec.tile) for w in weights])
    outputs = [np.full((*leading, n), np.nan, spec.output_dtype) for n in spec.out_features]
    extra = [b for b in biases if b is not None] + ([] if residual is None else [residual])
    func = packed_linear(spec, VectorTarget.of(target))
    results = run(func, x, packed, *extra, *outputs, outputs=len(outputs))
    for y, weight, bias in zip(results, weights, biases, strict=True):
        exact = x.astype("float64") @ weight.astype("float64").T
        exact += 0 if bias is None else bias.astype("float64")
        exact += 0 if residual is None else residual.astype("float64")
        np.testing.assert_allclose(y, exact, rtol=tolerance, atol=tolerance)


def test_any_number_of_rows(run, target):
    tile = VectorTarget.of(target).tile
    spec = PackedLinear(in_features=37, out_features=(50,), bias=(False,), leading=1, tile=tile)
    for rows in (0, 1, 2, 5, 7, 12, 13, 33, 95, 96, 97, 200):
        check(run, target, spec, (rows,), 2e-6)


@pytest.mark.parametrize(("features", "out"), [(1, 33), (129, 1), (63, 32), (8, 31), (5, 96)])
def test_odd_sizes(features, out, run, target):
    check(run, target, PackedLinear(features, (out,), (False,)), (2, 3), 4e-6)


def test_layers_that_share_x_with_and_without_bias(run, target):
    spec = PackedLinear(in_features=65, out_features=(33, 64, 1), bias=(True, False, True))
    for leading in ((1, 1), (5, 1), (3, 11)):
        check(run, target, spec, leading, 4e-6)


def test_bias_and_residual(run, target):
    spec = PackedLinear(in_features=48, out_features=(40,), bias=(True,), residual=True)
    for leading in ((1, 1), (2, 7)):
        check(run, target, spec, leading, 4e-6)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        (("float32", "float32", "float16"), 4e-6),
        (("float16", "float16", "float16"), 2e-3),
        (("float16", "float32", "float16"), 4e-6),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_float16_is_summed_in_float32(dtypes, tolerance, run, target):
    given, output, weight = dtypes
    spec = PackedLinear(300, (35,), (True,), input_dtype=given, output_dtype=output, weight_dtype=weight)
    for leading in ((1, 1), (1, 13)):
        check(run, target, spec, leading, tolerance)


@pytest.mark.parametrize("tile", [2, 8, 64])
def test_any_tile(tile, run, target):
    spec = PackedLinear(in_features=20, out_features=(70,), bias=(True,), leading=1, tile=tile)
    check(run, target, spec, (9,), 2e-6)
