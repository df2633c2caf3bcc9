import numpy as np
import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.formats import Codebook, EncodedKV, KVFormat, SplitCodebook, TileLayout, unpack_codes


def distortion(codec, x):
    return ((x - codec.decode(codec.encode(x))) ** 2).sum() / (x**2).sum()


@pytest.mark.parametrize(("head_dim", "low", "high"), [(64, 0.1145, 0.03339), (128, 0.1160, 0.03397)])
@pytest.mark.parametrize("name", ["turbo2.5:raw", "dense2.5:raw"])
def test_distortion_is_the_mean_of_its_halves(name, head_dim, low, high):
    x = np.random.default_rng(0).standard_normal((10_000, head_dim))
    assert distortion(KVFormat.parse(name).codec(head_dim, 1), x) == pytest.approx((low + high) / 2, rel=0.02)


def test_three_and_a_half_bits():
    x = np.random.default_rng(0).standard_normal((10_000, 128))
    assert distortion(KVFormat.parse("turbo3.5:raw").codec(128), x) == pytest.approx((0.03397 + 0.00932) / 2, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3])
def test_each_half_has_the_nearest_of_its_own_centroids(bits):
    book = SplitCodebook(bits, 64)
    y = np.random.default_rng(1).standard_normal((40, 64)) / 8
    codes = book.nearest(y)
    for part, width in ((slice(0, 32), bits + 1), (slice(32, 64), bits)):
        centroids = Codebook(width, 64).centroids.astype(float)
        np.testing.assert_array_equal(codes[:, part], np.abs(y[:, part, None] - centroids).argmin(-1))
        np.testing.assert_array_equal(book.decode(codes)[:, part], centroids[codes[:, part]])
    assert codes[:, :32].max() == 2 ** (bits + 1) - 1 and codes[:, 32:].max() == 2**bits - 1


@pytest.mark.parametrize("name", ["turbo2.5", "turbo3.5"])
def test_zero_vectors(name):
    codec = KVFormat.parse(name).codec(64)
    encoded = codec.encode(np.zeros((2, 64)))
    assert (encoded.gain == 0).all() and (codec.decode(encoded) == 0).all()
    bits = codec.format.bits
    np.testing.assert_array_equal(encoded.codes, np.repeat([[2**bits, 2 ** (bits - 1)]] * 2, 32, axis=1))


@pytest.mark.parametrize("pair", [("turbo2.5", "turbo3.5"), ("turbo3.5", "q8_0"), ("hurwitz3", "turbo2.5")])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_tiles_hold_low_bits_and_a_plane_of_top_bits(pair, head_dim):
    formats = [KVFormat.parse(word) for word in pair]
    rng = np.random.default_rng(2)
    k, v = (f.codec(head_dim, 1).encode(rng.standard_normal((3, 32, head_dim))) for f in formats)
    layout = TileLayout(*formats, head_dim)
    tiles = layout.pack(k, v)
    assert tiles.shape == (3, layout.tile_bytes)
    assert layout.tile_bytes * 8 / 32 / head_dim == pytest.approx(sum(f.bits_per_element(head_dim) for f in formats))
    for found, expected in zip(layout.unpack(tiles), (k, v), strict=True):
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.gain, expected.gain)
    for role, found, encoded in zip("kv", formats, (k, v), strict=True):
        section = layout.sections[f"{role}_extra"]
        if found.codebook != "split":
            assert section.nbytes == 0
            continue
        plane = unpack_codes(tiles[:, section.offset : section.offset + section.nbytes], role, 1, head_dim // 2)
        np.testing.assert_array_equal(plane, encoded.codes[..., : head_dim // 2] >> found.bits)


def test_codes_beyond_their_half_are_refused():
    found = KVFormat.parse("turbo2.5")
    encoded = found.codec(64).encode(np.ones((32, 64)))
    codes = encoded.codes.copy()
    codes[0, 40] = 5
    with pytest.raises(UsageError, match=r"turbo2\.5 codes reach 5; 2 bits hold less"):
        TileLayout(found, found, 64).pack(EncodedKV(codes, encoded.gain), encoded)
