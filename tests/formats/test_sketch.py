import numpy as np
import pytest

from rotquant_tvm.errors import FormatError
from rotquant_tvm.formats import Codec, KVFormat, Rotation, TileLayout

NAMES = ("turbo2+qjl", "turbo3+qjl", "turbo4+qjl", "dense3+qjl", "qjl1")


def codec_of(name, head_dim=64, seed=0):
    return KVFormat.parse(name).codec(head_dim, seed)


def test_qjl1_is_the_published_estimator():
    """√(π/2)/m · ‖k‖ · ⟨S q, sign(S k)⟩ with m = d; METHODS: two-stage systems."""
    codec = codec_of("qjl1")
    rng = np.random.default_rng(0)
    k, q = rng.standard_normal((20, 64)) * 3, rng.standard_normal((5, 64))
    encoded = codec.encode(k)
    assert encoded.codes.max() == 1 and encoded.gain.shape == (20, 1)
    s = codec.rotation.matrix()
    norm = np.linalg.norm(k, axis=1).astype(np.float16)
    np.testing.assert_array_equal(encoded.gain[:, 0], norm)
    expected = np.sqrt(np.pi / 2) / 64 * norm.astype(float) * ((q @ s.T) @ np.sign(k @ s.T).T)
    np.testing.assert_allclose(codec.score(q, encoded), expected, rtol=1e-6)
    np.testing.assert_allclose(q @ codec.decode(encoded).T, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["turbo3+qjl", "dense2+qjl:mse"])
def test_prod_is_a_code_and_a_sketch_of_its_residual(name):
    """⟨y, x̂⟩ + ‖r‖·√(π/2)/m·⟨S y, sign(S r)⟩, S drawn in the rotated basis."""
    codec = codec_of(name)
    bits = codec.format.bits
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((5, 64))
    encoded = codec.encode(x)
    first = KVFormat.parse(f"{codec.format.rotation}{bits}:{codec.format.gain}").codec(64)
    plain = first.encode(x)
    np.testing.assert_array_equal(encoded.codes & (2**bits - 1), plain.codes)
    np.testing.assert_array_equal(encoded.gain[:, :1], plain.gain)
    residual = x - first.decode(plain)
    s = codec.sketch.matrix() @ codec.rotation.matrix()
    signs = np.sign(residual @ s.T)
    np.testing.assert_array_equal(encoded.codes >> bits, signs > 0)
    norm = np.linalg.norm(residual, axis=1)
    np.testing.assert_allclose(encoded.gain[:, 1], norm, rtol=1e-3)
    estimate = np.sqrt(np.pi / 2) / 64 * encoded.gain[:, 1].astype(float) * ((y @ s.T) @ signs.T)
    np.testing.assert_allclose(codec.score(y, encoded), y @ first.decode(plain).T + estimate, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_inner_products_with_the_decoded_vector(name):
    codec = codec_of(name, seed=3)
    rng = np.random.default_rng(2)
    x, q = rng.standard_normal((30, 64)), rng.standard_normal((4, 64))
    encoded = codec.encode(x)
    np.testing.assert_allclose(codec.score(q, encoded), q @ codec.decode(encoded).T, atol=1e-10)
    np.testing.assert_allclose(codec.rotate(q) @ codec.decode_rotated(encoded).T, codec.score(q, encoded), atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_unbiased_over_sketches(name):
    """Averaged over draws of S (and R), the estimate is the inner product."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal(64)
    q = x + rng.standard_normal(64)
    draws = 1_500
    estimates = []
    for seed in range(draws):
        codec = codec_of(name, seed=seed)
        estimates.append(codec.score(q, codec.encode(x[None]))[0])
    error = np.std(estimates) / np.sqrt(draws)
    bound = 4 * error + 1e-3 * abs(q @ x)
    assert abs(np.mean(estimates) - q @ x) < bound < 0.1 * abs(q @ x)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_keep_everything(name):
    found = KVFormat.parse(name)
    rng = np.random.default_rng(5)
    k, v = (found.codec(128, s).encode(rng.standard_normal((2, 32, 128))) for s in (0, 1))
    layout = TileLayout(found, found, 128)
    for back, expected in zip(layout.unpack(layout.pack(k, v)), (k, v), strict=True):
        np.testing.assert_array_equal(back.codes, expected.codes)
        np.testing.assert_array_equal(back.gain, expected.gain)
    assert layout.tile_bytes == 2 * 32 * 128 * found.bits_per_element(128) / 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_awkward_vectors_have_defined_results(name, dtype):
    codec = codec_of(name)
    x = np.random.default_rng(6).standard_normal((5, 64))
    x[0], x[1, 3], x[2, 4], x[3] = 0, np.nan, np.inf, 1e-9
    encoded = codec.encode(x, dtype)
    decoded = codec.decode(encoded, dtype)
    assert decoded.dtype == dtype and np.isfinite(decoded).all() and (decoded[0] == 0).all()
    assert np.isfinite(encoded.gain).all() and (encoded.gain >= 0).all()


def test_draws_follow_the_seed_and_differ_from_the_rotations():
    codec = codec_of("dense3+qjl", seed=(1, 2))
    np.testing.assert_array_equal(codec.sketch.data, codec_of("dense3+qjl", seed=(1, 2)).sketch.data)
    assert not np.array_equal(codec.sketch.data, codec_of("dense3+qjl", seed=(1, 3)).sketch.data)
    gaussian = codec.sketch.matrix()
    assert abs(gaussian.mean()) < 0.06 and gaussian.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(gaussian.ravel(), codec.rotation.matrix().ravel())[0, 1]) < 0.06


def test_coefficients_are_those_of_rotation_and_sketch():
    codec = codec_of("turbo3+qjl")
    size = codec.rotation.data.size
    np.testing.assert_array_equal(codec.coefficients[:size], codec.rotation.data)
    np.testing.assert_array_equal(codec.coefficients[size:], codec.sketch.data)
    transposed = codec.inverse_coefficients[size:].reshape(64, 64).T
    np.testing.assert_array_equal(transposed, codec.sketch.matrix().astype(np.float32))
    assert codec_of("f16").coefficients.shape == (1,)


def test_a_codec_has_a_sketch_exactly_if_its_format_needs_one():
    rotation = Rotation.draw("turbo", 64)
    with pytest.raises(FormatError, match=r"turbo3\+qjl needs a sketch"):
        Codec(KVFormat.parse("turbo3+qjl"), rotation)
    with pytest.raises(FormatError, match="turbo3 has no sketch"):
        Codec(KVFormat.parse("turbo3"), rotation, Rotation.draw("gaussian", 64))
