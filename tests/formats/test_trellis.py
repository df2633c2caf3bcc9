"""The trellis codebook: its windows, the encoder against searching all rings, and the distortion it reaches."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import FormatError
from rotquant_tvm.formats import KVFormat, TileLayout
from rotquant_tvm.formats.trellis import (
    STATES,
    TRELLIS_BITS,
    TRELLIS_HEAD_DIMS,
    Trellis,
    closed_path,
    ring_codes,
    states,
)

BITS = pytest.mark.parametrize("bits", TRELLIS_BITS)


def isotropic(count, head_dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, head_dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def error(unit, table, codes, bits):
    return ((unit - table[states(codes, bits)]) ** 2).sum(-1)


@BITS
def test_the_table_is_an_antisymmetric_int8_grid_without_0(bits):
    trellis = Trellis(bits, 96)
    grid = trellis.grid.astype(int)
    assert trellis.grid.dtype == np.int8 and grid.shape == (STATES,)
    assert (grid != 0).all() and abs(grid).max() == 127
    np.testing.assert_array_equal(grid[::-1], -grid)
    assert trellis.scale.dtype == trellis.centroids.dtype == np.float32
    np.testing.assert_array_equal(trellis.centroids, np.float32(grid) * trellis.scale)
    for head_dim in TRELLIS_HEAD_DIMS:
        assert Trellis(bits, head_dim).scale * np.sqrt(head_dim) == pytest.approx(trellis.scale * np.sqrt(96))


@BITS
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(0, 31))
def test_a_state_is_the_last_8_bits_of_the_ring_of_codes(bits, seed, dim):
    codes = np.random.default_rng(seed).integers(0, 2**bits, 32, dtype=np.uint8)
    stream = 0
    for code in np.roll(codes, 31 - dim):  # the code of ``dim`` comes last
        stream = stream << bits | int(code)
    assert states(codes, bits)[dim] == stream % 256


@BITS
def test_an_element_decodes_from_its_own_window(bits):
    trellis = Trellis(bits, 64)
    codes = np.random.default_rng(bits).integers(0, 2**bits, 64, dtype=np.uint8)
    other = codes.copy()
    other[5] ^= 1
    changed = np.flatnonzero(trellis.decode(codes) != trellis.decode(other))
    reach = -(-8 // bits)
    assert set(changed) == set(range(5, 5 + reach))


@pytest.mark.parametrize(("bits", "head_dim"), [(2, 4), (2, 5), (3, 3), (4, 2), (4, 3)])
def test_the_best_closed_path_is_the_best_ring_of_all(bits, head_dim):
    table = Trellis(bits, 64).centroids.astype(float) * 8
    unit = np.random.default_rng(bits).standard_normal((20, head_dim))
    rings = np.array(list(itertools.product(range(2**bits), repeat=head_dim)), np.uint8)
    values = table[states(rings, bits)]
    best = ((unit[:, None] - values) ** 2).sum(-1).min(1)
    groups = STATES >> bits
    paths = [closed_path(unit, table, bits, np.full(len(unit), group)) for group in range(groups)]
    for group, codes in enumerate(paths):
        assert (states(codes, bits)[:, -1] % groups == group).all()
    found = np.min([error(unit, table, codes, bits) for codes in paths], axis=0)
    np.testing.assert_allclose(found, best, rtol=1e-9)


CLOSINGS = [(2, 64, 1.007), (3, 64, 1.003), (4, 32, 1.02), (2, 128, 1.005)]


@pytest.mark.parametrize(("bits", "head_dim", "limit"), CLOSINGS)
def test_two_passes_come_near_trying_every_closing(bits, head_dim, limit):
    table = Trellis(bits, head_dim).centroids.astype(float)
    unit = isotropic(150, head_dim)
    found = error(unit, table, ring_codes(unit, table, bits), bits)
    paths = [closed_path(unit, table, bits, np.full(len(unit), group)) for group in range(STATES >> bits)]
    least = np.min([error(unit, table, codes, bits) for codes in paths], axis=0)
    assert (found >= least - 1e-12).all()
    assert found.sum() <= limit * least.sum()


DISTORTION = {
    64: (0.0744, 0.0200, 0.00536),
    80: (0.0748, 0.0202, 0.00542),
    96: (0.0751, 0.0203, 0.00545),
    128: (0.0755, 0.0205, 0.00551),
    256: (0.0760, 0.0207, 0.00557),
}


@BITS
@pytest.mark.parametrize("head_dim", DISTORTION)
def test_distortion_of_isotropic_vectors_with_mse_gain(bits, head_dim):
    codec, plain = (KVFormat.parse(f"planar{bits}{end}").codec(head_dim, seed=1) for end in ("+tcq", ":mse"))
    x = isotropic(1000, head_dim, seed=head_dim)
    found, scalar = (((x - c.decode(c.encode(x))) ** 2).sum() / (x**2).sum() for c in (codec, plain))
    assert found == pytest.approx(DISTORTION[head_dim][bits - 2], rel=0.02)
    assert found <= 0.68 * scalar


@BITS
@pytest.mark.parametrize("gain", ["raw", "norm", "mse", "ip"])
def test_the_pipeline_is_the_definition(bits, gain):
    """x̂ = gain · Rᵀ values, the gain by its rule; codes do not depend on the rule."""
    codec = KVFormat.parse(f"turbo{bits}+tcq:{gain}").codec(64, seed=3)
    x = np.random.default_rng(1).standard_normal((3, 5, 64)) * 4
    encoded = codec.encode(x)
    rho, y = np.linalg.norm(x, axis=-1), x @ codec.rotation.matrix().T
    q = (codec.codebook.grid * float(codec.codebook.scale))[states(encoded.codes, bits)]
    product, square = (y * q).sum(-1), (q * q).sum(-1)
    expected = {"raw": rho, "norm": rho / np.sqrt(square), "mse": product / square, "ip": rho**2 / product}[gain]
    np.testing.assert_allclose(encoded.gain[..., 0], expected, rtol=1e-3)
    gains = encoded.gain.astype(float)
    np.testing.assert_allclose(codec.decode(encoded), gains * q @ codec.rotation.matrix(), atol=1e-5)
    plain = KVFormat.parse(f"turbo{bits}+tcq").codec(64, seed=3)
    np.testing.assert_array_equal(plain.encode(1e-3 * x).codes, encoded.codes)


def test_awkward_vectors():
    codec = KVFormat.parse("hurwitz3+tcq").codec(64)
    x = np.random.default_rng(0).standard_normal((6, 64))
    clean = codec.encode(x)
    x[1], x[2], x[3], x[4, 7] = 0, np.nan, np.inf, np.nan
    encoded = codec.encode(x)
    for row in (1, 2):
        assert (encoded.codes[row] == 4).all() and encoded.gain[row] == 0
    assert np.isfinite(codec.decode(encoded)).all()
    exact = codec.decode(codec.encode(np.where(np.isnan(x[4]), 0, x[4])))
    np.testing.assert_array_equal(codec.decode(encoded)[4], exact)
    for row in (0, 5):
        np.testing.assert_array_equal(encoded.codes[row], clean.codes[row])


def test_tiles_are_those_of_the_scalar_format():
    plain, coded = (KVFormat.parse(text) for text in ("hurwitz3", "hurwitz3+tcq"))
    assert TileLayout(plain, plain, 80).sections == TileLayout(coded, coded, 80).sections
    assert coded.bits_per_element(128) == 3.125


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rq3+tcq", "hurwitz3+tcq"),
        ("hurwitz4:mse+tcq", "hurwitz4+tcq"),
        ("turbo2:norm+tcq", "turbo2+tcq:norm"),
        ("iso3-2d+tcq:ip", "planar3+tcq:ip"),
    ],
)
def test_spellings(text, name):
    found = KVFormat.parse(text)
    assert found.name == name and found.codebook == "trellis"
    assert KVFormat.parse(found.name) == found


@pytest.mark.parametrize("text", ["hurwitz1+tcq", "q8_0+tcq", "f16+tcq", "hurwitz3+tcq+tcq", "hurwitz3+tcq:block"])
def test_other_formats_take_no_trellis(text):
    with pytest.raises(FormatError):
        KVFormat.parse(text)


@pytest.mark.parametrize(("bits", "head_dim"), [(1, 64), (5, 64), (3, 72), (3, 512)])
def test_other_shapes_are_refused_by_name(bits, head_dim):
    with pytest.raises(FormatError, match=str(head_dim if bits == 3 else bits)):
        Trellis(bits, head_dim)
