import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import Codec, KVFormat, Rotation, rotation_families, sanitize

TEXTS = (
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "turbo2.5",
    "dense3.5:mse",
    "turbo3+qjl",
    "qjl1",
    "planar3",
    "iso1",
    "iso2-full",
    "rotor3",
    "turbo4",
    "dense2",
    "rq3",
    "rq4:ip",
    "hurwitz1:norm",
)
LLOYD = [text for text in TEXTS if KVFormat.parse(text).codebook == "lloyd"]


def codec_of(text, head_dim=64, seed=0):
    return KVFormat.parse(text).codec(head_dim, seed)


def distortion(codec, x):
    return ((x - codec.decode(codec.encode(x))) ** 2).sum() / (x**2).sum()


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (64, [0.3584, 0.1145, 0.03339, 0.00913]),
        (128, [0.3609, 0.1160, 0.03397, 0.00932]),
        (256, [0.3621, 0.1167, 0.03426, 0.00941]),
    ],
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_of_isotropic_vectors_with_raw_gain(head_dim, expected, bits):
    x = np.random.default_rng(bits).standard_normal((20_000, head_dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert distortion(codec_of(f"hurwitz{bits}:raw", head_dim), x) == pytest.approx(
        expected[bits - 1], rel=0.02
    )


def test_isotropic_vectors_cannot_rank_rotations():
    x = np.random.default_rng(0).standard_normal((20_000, 64))
    for family in rotation_families():
        codec = KVFormat(family, family, "lloyd", 3, "raw").codec(64, seed=1)
        assert distortion(codec, x) == pytest.approx(0.03339, rel=0.02), family


def test_outlier_channels_rank_rotations_by_how_far_they_mix():
    """Lognormal vectors with 4 channels ×20, d = 128, 3 bits; METHODS §5 has the figures."""
    rng = np.random.default_rng(0)
    x = rng.lognormal(sigma=0.5, size=(6_000, 128)) * rng.choice([-1.0, 1.0], (6_000, 128))
    x[:, [17, 40, 77, 110]] *= 20
    found = {
        family: np.mean(
            [distortion(KVFormat(family, family, "lloyd", 3, "raw").codec(128, s), x) for s in range(3)]
        )
        for family in rotation_families()
    }
    assert found["none"] > found["planar"] > found["rotor"] > found["iso"] > 5 * found["hurwitz"]
    assert found["rotor"] > found["iso-full"] > 5 * found["hurwitz"]
    for mixing, reference in {"hurwitz": 0.0305, "turbo": 0.0293, "dense": 0.0338}.items():
        assert found[mixing] == pytest.approx(reference, rel=0.15), mixing


@pytest.mark.parametrize("text", LLOYD)
def test_the_pipeline_is_the_definition(text):
    """x̂ = gain · Rᵀ (scale · grid[code]), code the nearest centroid to R x/ρ."""
    codec = codec_of(text)
    x = np.random.default_rng(1).standard_normal((3, 5, 64)) * 4
    encoded = codec.encode(x)
    assert encoded.codes.dtype == np.uint8 and encoded.codes.shape == x.shape
    assert encoded.gain.dtype == np.float16 and encoded.gain.shape == (3, 5, 1)
    centroids = codec.codebook.grid * float(codec.codebook.scale)
    unit = x @ codec.rotation.matrix().T / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_array_equal(encoded.codes, np.abs(unit[..., None] - centroids).argmin(-1))
    expected = encoded.gain.astype(float) * centroids[encoded.codes] @ codec.rotation.matrix()
    np.testing.assert_allclose(codec.decode(encoded), expected, atol=1e-6)
    np.testing.assert_allclose(codec.rotate(codec.decode(encoded)), codec.decode_rotated(encoded), atol=1e-12)


@pytest.mark.parametrize("text", LLOYD)
def test_scores_and_outputs_need_no_unrotated_cache(text):
    """⟨q, x̂⟩ = ⟨R q, R x̂⟩ and Σ p x̂ = Rᵀ Σ p R x̂."""
    codec = codec_of(text)
    rng = np.random.default_rng(2)
    x, q, p = rng.standard_normal((32, 64)), rng.standard_normal(64), rng.random(32)
    encoded = codec.encode(x)
    np.testing.assert_allclose(codec.decode(encoded) @ q, codec.decode_rotated(encoded) @ codec.rotate(q))
    np.testing.assert_allclose(p @ codec.decode(encoded), codec.unrotate(p @ codec.decode_rotated(encoded)))


def test_q8_0_blocks_of_32():
    x = np.random.default_rng(3).standard_normal((7, 80)) * np.repeat([1.0, 30.0, 0.01], 32)[:80]
    codec = codec_of("q8_0", 80)
    encoded = codec.encode(x)
    assert encoded.codes.dtype == np.uint8 and encoded.gain.shape == (7, 3)
    for block in range(3):
        part = slice(32 * block, min(32 * block + 32, 80))
        scale = np.float16(np.abs(x[:, part]).max(1) / 127)
        np.testing.assert_array_equal(encoded.gain[:, block], scale)
        quotient = x[:, part] / scale[:, None].astype(float)
        np.testing.assert_array_equal(
            encoded.codes[:, part].view(np.int8), np.clip(np.round(quotient), -127, 127)
        )
        error = np.abs(codec.decode(encoded)[:, part] - x[:, part])
        assert (error <= scale[:, None] * (0.5 + 127 / 1024)).all()
    assert codec.rotation.identity and codec.codebook is None


def test_q8_0_rounds_half_to_even():
    x = np.zeros(32)
    x[:5] = [127.0, 0.5, 1.5, 2.5, -2.5]
    encoded = codec_of("q8_0", 32).encode(x)
    np.testing.assert_array_equal(encoded.codes[:5].view(np.int8), [127, 0, 2, 2, -2])


@pytest.mark.parametrize(("text", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_16_bit_formats_are_bit_patterns(text, dtype):
    x = np.random.default_rng(4).standard_normal((6, 64)).astype(np.float32)
    codec = codec_of(text)
    encoded = codec.encode(x)
    assert encoded.codes.dtype == np.uint16 and encoded.gain.shape == (6, 0)
    np.testing.assert_array_equal(encoded.codes, x.astype(dtype).view(np.uint16))
    np.testing.assert_array_equal(codec.decode(encoded), x.astype(dtype).astype(float))


@pytest.mark.parametrize("text", TEXTS)
def test_zero_vectors(text):
    codec = codec_of(text)
    encoded = codec.encode(np.zeros((2, 64)))
    assert (encoded.gain == 0).all() and (codec.decode(encoded) == 0).all()
    middle = codec.codebook.middle() if codec.codebook else {"q4_0": 8}.get(text, 0)
    assert (encoded.codes == middle).all()


AWKWARD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 6e-8, 65504.0, 65520.0, 3e38, -3e38]


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(
        np.float32, (3, 64), elements=st.sampled_from(AWKWARD) | st.floats(width=32), fill=st.nothing()
    ),
    dtype=st.sampled_from((np.float64, np.float32)),
)
def test_every_input_has_a_defined_result(text, x, dtype):
    codec = codec_of(text)
    encoded = codec.encode(x, dtype)
    assert np.isfinite(encoded.gain).all() and ((encoded.gain >= 0).all() or text == "q4_0")
    plane = codec.format.plane_dims(64)
    assert encoded.codes[:, :plane].max(initial=0) >> (codec.format.bits + 1) == 0
    assert encoded.codes[:, plane:].max(initial=0) >> codec.format.bits == 0
    decoded = codec.decode(encoded, dtype)
    assert decoded.dtype == dtype and np.isfinite(decoded).all()
    clean = codec.encode(np.nan_to_num(x.astype(float), nan=0, posinf=65504, neginf=-65504), dtype)
    np.testing.assert_array_equal(clean.codes, encoded.codes)
    np.testing.assert_array_equal(clean.gain, encoded.gain)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("level", [1e-310, 1e-42, 1e-20])
def test_vectors_below_fp16_decode_to_zero(text, level):
    codec = codec_of(text)
    decoded = codec.decode(codec.encode(np.full((1, 64), level)))
    np.testing.assert_allclose(decoded, 0.0, atol=1.01 * level)


@pytest.mark.parametrize("text", TEXTS)
def test_one_bad_element_does_not_spoil_its_neighbours(text):
    codec = codec_of(text)
    x = np.random.default_rng(6).standard_normal((4, 64))
    bad = x.copy()
    bad[1, 5], x[1, 5] = np.nan, 0.0
    np.testing.assert_array_equal(codec.decode(codec.encode(bad)), codec.decode(codec.encode(x)))


def test_huge_vectors_saturate():
    codec = codec_of("hurwitz4:raw")
    encoded = codec.encode(np.full((1, 64), 1e30))
    assert encoded.gain[0, 0] == 65504.0
    assert (codec_of("f16").decode(codec_of("f16").encode(np.full((1, 64), -np.inf))) == -65504.0).all()


@pytest.mark.parametrize("text", LLOYD)
def test_codes_do_not_see_the_scale_and_gains_follow_it(text):
    codec = codec_of(text)
    x = np.random.default_rng(7).standard_normal((20, 64))
    small, large = codec.encode(x), codec.encode(x * 64)
    np.testing.assert_array_equal(small.codes, large.codes)
    np.testing.assert_array_equal(small.gain * np.float16(64), large.gain)
    mirrored = codec.encode(-x)
    np.testing.assert_array_equal(mirrored.codes, 2**codec.format.bits - 1 - small.codes)
    np.testing.assert_array_equal(mirrored.gain, small.gain)


@pytest.mark.parametrize("text", TEXTS)
def test_float32_agrees_with_float64_except_on_boundaries(text):
    codec = codec_of(text, 64)
    x = np.random.default_rng(8).standard_normal((2_000, 64)).astype(np.float32)
    double, single = codec.encode(x), codec.encode(x, np.float32)
    assert (double.codes != single.codes).mean() < 1e-4
    np.testing.assert_allclose(double.gain, single.gain, rtol=2e-3)
    np.testing.assert_allclose(codec.decode(double), codec.decode(double, np.float32), atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_batch_shape_does_not_matter(text):
    codec = codec_of(text)
    x = np.random.default_rng(9).standard_normal((2, 3, 64))
    whole, single = codec.encode(x), codec.encode(x[1, 2])
    np.testing.assert_array_equal(whole.codes[1, 2], single.codes)
    np.testing.assert_array_equal(whole.gain[1, 2], single.gain)
    assert codec.decode(codec.encode(x[:0])).shape == (0, 3, 64)


def test_bits_per_element_is_the_formats():
    assert codec_of("rq3", 128).bits_per_element == 3.125
    assert codec_of("rq3", 64).bits_per_element == 3.25


def test_refusals():
    codec = codec_of("rq3")
    with pytest.raises(UsageError, match=r"shape \[2, 32\].*head_dim 64"):
        codec.encode(np.zeros((2, 32)))
    with pytest.raises(UsageError, match="cannot compute in float16"):
        sanitize(np.zeros(3), np.float16)
    with pytest.raises(FormatError, match=r"f16 has layers .* \(\), not .*Rotation.draw\('none', 64\)"):
        Codec(KVFormat.parse("f16"), Rotation.draw("iso", 64))
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 96"):
        Codec(KVFormat.parse("turbo3"), Rotation.draw("iso", 96))
