import numpy as np
import pytest

from rotquant_tvm.formats import KVFormat


def codec_of(text, head_dim=64):
    return KVFormat.parse(text).codec(head_dim)


def reference_q4_0(block):
    """llama.cpp's definition of one block, element by element, with the scale as it is stored."""
    largest = 0.0
    for value in block:
        if abs(value) > abs(largest):
            largest = value
    scale = float(np.float16(largest / -8))
    codes = [min(15, int(value / scale + 8.5)) if scale else 8 for value in block]
    return scale, codes


@pytest.mark.parametrize("head_dim", [64, 80])
def test_q4_0_blocks_of_32(head_dim):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, head_dim)) * np.repeat([1.0, 30.0, 0.01], 32)[:head_dim]
    codec = codec_of("q4_0", head_dim)
    encoded = codec.encode(x)
    assert encoded.codes.dtype == np.uint8 and encoded.gain.shape == (50, -(-head_dim // 32))
    signs = set()
    for row, codes, gain in zip(x, encoded.codes, encoded.gain, strict=True):
        for block in range(gain.size):
            part = slice(32 * block, min(32 * block + 32, head_dim))
            scale, expected = reference_q4_0(row[part])
            signs.add(np.sign(scale))
            assert gain[block] == scale
            np.testing.assert_array_equal(codes[part], expected)
            np.testing.assert_allclose(codec.decode(encoded)[(x == row).all(1)][0, part], scale * (codes[part] - 8.0))
    assert signs == {-1.0, 1.0} and codec.rotation.identity and codec.codebook is None


def test_q4_0_keeps_the_largest_element_and_is_within_a_step_of_the_others():
    x = np.random.default_rng(1).standard_normal((200, 32))
    codec = codec_of("q4_0", 32)
    error = np.abs(codec.decode(codec.encode(x)) - x)
    scale = np.abs(x).max(1, keepdims=True) / 8
    largest = np.abs(x) == np.abs(x).max(1, keepdims=True)
    assert (error[largest] <= 2e-3 * np.abs(x[largest])).all()
    assert (error <= scale * 1.01).all() and (error > scale * 0.51).mean() < 0.02


def test_q4_0_ties_and_zeros():
    x = np.zeros((3, 32))
    x[1, :3] = [-2.0, 2.0, 0.125]  # the first of two that are largest; 8.5 - 0.5 rounds up
    encoded = codec_of("q4_0", 32).encode(x)
    assert encoded.gain[1, 0] == 0.25 and (encoded.gain[[0, 2]] == 0).all()
    np.testing.assert_array_equal(encoded.codes[1, :4], [0, 15, 9, 8])
    assert (encoded.codes[[0, 2]] == 8).all()


def test_q4_0_saturates_with_its_sign():
    x = np.zeros((2, 32))
    x[0, 3], x[1, 3] = np.inf, -1e30
    encoded = codec_of("q4_0", 32).encode(x)
    np.testing.assert_array_equal(encoded.gain[:, 0], [-8188.0, 8188.0])
    assert (codec_of("q4_0", 32).decode(encoded)[:, 3] == [65504.0, -65504.0]).all()


def test_distortion_of_isotropic_vectors():
    x = np.random.default_rng(2).standard_normal((4_000, 128))

    def distortion(text):
        codec = codec_of(text, 128)
        return ((codec.decode(codec.encode(x)) - x) ** 2).sum() / (x**2).sum()

    assert distortion("q8_0") < 1e-4
    assert distortion("q4_0") == pytest.approx(0.0074, rel=0.03)
