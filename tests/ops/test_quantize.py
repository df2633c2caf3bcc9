"""Quantize, dequantize and roundtrip against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rotquant_tvm import ops
from rotquant_tvm.formats import EncodedKV

from .reference import check_encoding, codec_of

CODECS = [
    ("f16", 64),
    ("bf16", 80),
    ("q8_0", 64),
    ("q8_0", 80),
    ("q4_0", 64),
    ("q4_0", 80),
    ("turbo2.5", 64),
    ("dense3.5:mse", 96),
    ("turbo2+qjl", 128),
    ("dense4+qjl:norm", 80),
    ("qjl1", 96),
    ("planar1", 64),
    ("planar3:mse", 96),
    ("iso4", 128),
    ("iso2-full", 80),
    ("rotor2", 64),
    ("rotor3", 128),
    ("rotor4:ip", 80),
    ("turbo3", 256),
    ("turbo4", 64),
    ("dense2:norm", 64),
    ("dense3", 96),
    ("hurwitz1:ip", 96),
    ("hurwitz2:raw", 128),
    ("hurwitz3", 256),
    ("rq4", 80),
    ("hurwitz2+tcq", 64),
    ("rotor3+tcq:norm", 80),
    ("turbo4+tcq", 256),
]
LEVELS = [1e-6, 1.0, 1e3]  # of a vector's elements


def encode(kernels, codec, x, poisoned):
    """Run ``quantize`` on x [n, d]."""
    gains = max(1, codec.gains_per_vector)
    codes = poisoned(x.shape, np.uint16 if codec.format.bits == 16 else np.uint8)
    gain = poisoned((len(x), gains), np.float16)
    kernel = kernels.build(ops.quantize, codec, str(x.dtype))
    codes, gain = kernels.run(kernel, x, codec.coefficients, codes, gain, writes=(-2, -1))
    return EncodedKV(codes, gain[:, : codec.gains_per_vector])


def decode(kernels, codec, encoded, poisoned, dtype="float32"):
    """Run ``dequantize``."""
    gain = encoded.gain if codec.gains_per_vector else poisoned((len(encoded.codes), 1), np.float16)
    kernel = kernels.build(ops.dequantize, codec, dtype)
    out = poisoned(encoded.codes.shape, dtype)
    inverse = codec.inverse_coefficients
    return kernels.run(kernel, encoded.codes, gain, inverse, out, writes=(-1,))


def roundtrip(kernels, codec, x, poisoned):
    """Run ``roundtrip`` on x [n0, n1, n2, d]."""
    kernel = kernels.build(ops.roundtrip, codec, str(x.dtype))
    rotations = [codec.coefficients, codec.inverse_coefficients]
    return kernels.run(kernel, x, *rotations, poisoned(x.shape, x.dtype), writes=(-1,))


def vectors(rng, codec, count=60):
    """Vectors of several magnitudes, with outlier channels."""
    x = rng.standard_normal((count, codec.head_dim)) * rng.choice(LEVELS, (count, 1))
    x[:, rng.integers(codec.head_dim)] *= 20
    return x.astype(np.float32)


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
def test_quantize_is_the_formats_encode(kernels, rng, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    x = vectors(rng, codec)
    check_encoding(codec, x, encode(kernels, codec, x, poisoned))


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
def test_dequantize_is_the_formats_decode(kernels, rng, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    encoded = codec.encode(vectors(rng, codec))
    expected = codec.decode(encoded)
    actual = decode(kernels, codec, encoded, poisoned)
    size = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(actual - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize(("text", "head_dim"), [("f16", 64), ("bf16", 80), ("q8_0", 80), ("turbo4", 64)])
def test_dequantize_reads_every_code(kernels, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    count = 2**codec.format.bits
    numbers = np.resize(np.arange(count), -(-count // head_dim) * head_dim).reshape(-1, head_dim)
    codes = numbers.astype(np.uint16 if codec.format.bits == 16 else np.uint8)
    encoded = EncodedKV(codes, np.full((len(codes), codec.gains_per_vector), 0.75, np.float16))
    with np.errstate(invalid="ignore"):
        expected = codec.decode(encoded)
    actual = decode(kernels, codec, encoded, poisoned)
    finite = np.isfinite(expected) & ((np.abs(expected) >= 2.0**-126) | (expected == 0))
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(actual), np.isposinf(expected))


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
def test_roundtrip_is_quantize_then_dequantize(kernels, rng, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    x = vectors(rng, codec).reshape(3, 4, 5, head_dim)
    actual = roundtrip(kernels, codec, x, poisoned)
    flat = x.reshape(-1, head_dim)
    expected = codec.decode(encode(kernels, codec, flat, poisoned)).reshape(x.shape)
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    assert (np.abs(actual - expected) <= 1e-5 * size).all()
    exact = ((x - codec.decode(codec.encode(x))) ** 2).sum()
    assert ((x - actual) ** 2).sum() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("text", "head_dim"), [("bf16", 80), ("q8_0", 80), ("hurwitz3", 256), ("rotor2", 64)])
def test_half_precision_vectors(kernels, rng, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    x = rng.standard_normal((24, head_dim)).astype(np.float16)
    encoded = encode(kernels, codec, x, poisoned)
    check_encoding(codec, x, encoded)
    expected = codec.decode(encoded)
    half = decode(kernels, codec, encoded, poisoned, "float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, expected, rtol=1e-3, atol=1e-5)
    again = roundtrip(kernels, codec, x.reshape(2, 3, 4, head_dim), poisoned)
    np.testing.assert_allclose(again.reshape(x.shape), expected, rtol=1e-3, atol=1e-5)


AWKWARD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 6e-8, 65504.0, 65520.0, 3e38, -3e38]


@pytest.mark.parametrize(("text", "head_dim"), [("f16", 64), ("bf16", 80), ("q8_0", 64), ("rotor2", 64), ("rq4", 80)])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(1, 5))
def test_every_input_has_the_defined_result(kernels, poisoned, text, head_dim, data, count):
    codec = codec_of(text, head_dim)
    elements = st.sampled_from(AWKWARD) | st.floats(width=32)
    x = data.draw(hnp.arrays(np.float32, (count, head_dim), elements=elements, fill=st.sampled_from(AWKWARD)))
    encoded = encode(kernels, codec, x, poisoned)
    check_encoding(codec, x, encoded, ties=True)
    assert np.isfinite(decode(kernels, codec, encoded, poisoned)).all()


@pytest.mark.parametrize(("text", "head_dim"), [("q8_0", 80), ("hurwitz1:ip", 96), ("hurwitz3", 256), ("dense3", 96)])
def test_one_bad_vector_does_not_spoil_its_neighbours(kernels, rng, poisoned, text, head_dim):
    codec = codec_of(text, head_dim)
    x = vectors(rng, codec, 6)
    clean = encode(kernels, codec, x, poisoned)
    bad = x.copy()
    bad[1], bad[3], bad[4] = np.nan, 0.0, np.inf
    mixed = encode(kernels, codec, bad, poisoned)
    check_encoding(codec, bad, mixed)
    for row in (0, 2, 5):
        np.testing.assert_array_equal(mixed.codes[row], clean.codes[row])
        np.testing.assert_array_equal(mixed.gain[row], clean.gain[row])
