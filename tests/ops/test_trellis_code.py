"""The trellis operators against the NumPy reference: every state's value, the encoder's paths, awkward vectors."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.formats import EncodedKV
from rotquant_tvm.formats.trellis import TRELLIS_BITS, states

from .reference import check_encoding, codec_of, coefficients

BITS = pytest.mark.parametrize("bits", TRELLIS_BITS)


def encode(kernels, codec, x, poisoned):
    """Run ``quantize`` on x [n, d]."""
    codes, gain = poisoned(x.shape, np.uint8), poisoned((len(x), 1), np.float16)
    kernel = kernels.build(ops.quantize, codec, str(x.dtype))
    return EncodedKV(*kernels.run(kernel, x, coefficients(codec.rotation), codes, gain, writes=(-2, -1)))


@BITS
def test_every_state_has_its_value(kernels, rng, poisoned, bits):
    """Planar rotations of 0 are not drawn, so values are compared behind the rotation."""
    codec = codec_of(f"planar{bits}+tcq", 64)
    codes = rng.integers(0, 2**bits, (64, 64), dtype=np.uint8)
    assert len(np.unique(states(codes, bits))) == 256
    gain = rng.uniform(0.5, 2, (64, 1)).astype(np.float16)
    kernel = kernels.build(ops.dequantize, codec, "float32")
    inverse = coefficients(codec.inverse_rotation)
    actual = kernels.run(kernel, codes, gain, inverse, poisoned(codes.shape, "float32"), writes=(-1,))
    window = np.zeros(codes.shape, int)
    for back in range(8):
        window += np.roll(codes.astype(int), back, axis=1) << back * bits
    values = codec.codebook.grid[window % 256] * float(codec.codebook.scale) * gain
    np.testing.assert_allclose(actual @ codec.rotation.matrix().T, values, atol=2e-6)


@BITS
@pytest.mark.parametrize("head_dim", [32, 112, 128])
def test_paths_are_as_good_as_numpys(kernels, rng, poisoned, bits, head_dim):
    codec = codec_of(f"hurwitz{bits}+tcq" if head_dim % 64 == 0 else f"planar{bits}+tcq:ip", head_dim)
    x = (rng.standard_normal((200, head_dim)) * rng.lognormal(size=(200, 1))).astype(np.float32)
    check_encoding(codec, x, encode(kernels, codec, x, poisoned))


def test_both_passes_count(kernels, rng, poisoned):
    """Errors of vectors whose best ring is closed at state 0 anyway would not tell a missing first pass."""
    codec = codec_of("hurwitz2+tcq", 64)
    x = rng.standard_normal((400, 64)).astype(np.float32)
    found = encode(kernels, codec, x, poisoned)
    closing = states(found.codes, 2)[:, -1] % 64
    assert len(np.unique(closing)) > 40
    exact = codec.encode(x)
    assert (found.codes == exact.codes).all(-1).mean() > 0.98


def test_awkward_vectors_spoil_no_neighbour(kernels, rng, poisoned):
    codec = codec_of("hurwitz3+tcq", 64)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    clean = encode(kernels, codec, x, poisoned)
    bad = x.copy()
    bad[1], bad[2], bad[3], bad[5] = 0, np.nan, np.inf, 1e-42
    bad[6, 3], bad[7, ::2] = np.nan, -np.inf
    mixed = encode(kernels, codec, bad, poisoned)
    check_encoding(codec, bad, mixed, ties=True)
    assert np.isfinite(codec.decode(mixed)).all() and mixed.gain[5] == 0
    for row in (0, 4, 8):
        np.testing.assert_array_equal(mixed.codes[row], clean.codes[row])
        np.testing.assert_array_equal(mixed.gain[row], clean.gain[row])
