import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import FormatError
from rotquant_tvm.formats import CODEBOOK_BITS, HEAD_DIMS, Codebook

BOOKS = [(bits, head_dim) for head_dim in HEAD_DIMS for bits in CODEBOOK_BITS]


@pytest.mark.parametrize(("bits", "head_dim"), BOOKS)
def test_every_table_is_an_ascending_antisymmetric_int8_grid(bits, head_dim):
    book = Codebook(bits, head_dim)
    grid = book.grid.astype(int)
    assert book.grid.dtype == np.int8 and grid.shape == (2**bits,)
    assert (np.diff(grid) > 0).all() and abs(grid).max() <= 127
    np.testing.assert_array_equal(grid[::-1], -grid)
    assert book.scale.dtype == book.centroids.dtype == book.boundaries.dtype == np.float32
    np.testing.assert_array_equal(book.centroids, np.float32(book.grid) * book.scale)
    np.testing.assert_allclose(book.boundaries, (book.centroids[1:] + book.centroids[:-1]) / 2, rtol=1e-6)
    assert book.boundaries[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize(
    ("bits", "half"),
    [
        (1, [0.7994]),
        (2, [0.4525, 1.5052]),
        (3, [0.2444, 0.7533, 1.3366, 2.1315]),
        (4, [0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889]),
    ],
)
def test_the_sphere_codebook_at_128(bits, half):
    book = Codebook(bits, 128)
    np.testing.assert_allclose(book.centroids[2 ** (bits - 1) :] * np.sqrt(128), half, atol=0.02)
    if bits == 3:
        np.testing.assert_array_equal(book.grid[4:], [13, 40, 71, 113])


@pytest.mark.parametrize("bits", CODEBOOK_BITS)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_nearest_finds_the_nearest_centroid_of_any_norm(bits, seed, norm):
    book = Codebook(bits, 64)
    y = np.random.default_rng(seed).standard_normal(64) / 8
    codes = book.nearest(y * norm, norm)
    error = np.abs(y - book.centroids[codes].astype(float))
    best = np.abs(y[:, None] - book.centroids.astype(float)).min(1)
    np.testing.assert_allclose(error, best, atol=1e-8)
    assert codes.dtype == np.uint8


def test_a_value_on_a_boundary_takes_the_code_below():
    book = Codebook(3, 128)
    np.testing.assert_array_equal(book.nearest(book.boundaries), np.arange(7))
    np.testing.assert_array_equal(book.nearest(np.nextafter(book.boundaries, np.float32(1))), np.arange(1, 8))


@pytest.mark.parametrize(("bits", "head_dim"), [(0, 64), (5, 64), (8, 64), (3, 72), (3, 16), (3, 272)])
def test_other_shapes_are_refused_by_name(bits, head_dim):
    with pytest.raises(FormatError, match=str(head_dim if bits == 3 else bits)):
        Codebook(bits, head_dim)
