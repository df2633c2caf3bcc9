import numpy as np
import pytest

from rotquant_tvm.formats import codebook_generator as generator
from rotquant_tvm.formats.codebook_tables import TABLES


@pytest.mark.parametrize("head_dim", [32, 64, 128, 208, 256, 512])
def test_regenerating_gives_the_frozen_tables(head_dim):
    for bits in generator.BITS:
        book = generator.generate(bits, head_dim)
        scale, grid = TABLES[head_dim][bits - 1]
        assert book.grid == grid
        assert book.scale == pytest.approx(scale, rel=1e-6)


def test_the_tables_cover_every_head_dim_and_bit_width():
    assert tuple(TABLES) == generator.HEAD_DIMS == (*range(32, 257, 16), 512)
    assert all(len(books) == len(generator.BITS) for books in TABLES.values())


@pytest.mark.parametrize("head_dim", generator.HEAD_DIMS)
def test_the_grid_costs_less_than_a_fifth_of_a_percent(head_dim):
    for bits, (scale, grid) in zip(generator.BITS, TABLES[head_dim], strict=True):
        optimum = generator.distortion(generator.lloyd_max(bits, head_dim), head_dim)
        ratio = generator.distortion(np.array(grid) * np.float64(np.float32(scale)), head_dim) / optimum
        assert 1 - 1e-9 <= ratio < 1.002


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (64, [0.3584, 0.1145, 0.03339, 0.00913]),
        (128, [0.3609, 0.1160, 0.03397, 0.00932]),
        (256, [0.3621, 0.1167, 0.03426, 0.00941]),
    ],
)
def test_the_expected_distortion_of_isotropic_vectors(head_dim, expected):
    found = [generator.distortion(generator.lloyd_max(bits, head_dim), head_dim) for bits in generator.BITS]
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_one_bit_is_the_mean_absolute_coordinate():
    """E|t| of a uniform unit vector in R³ is 1/2, and its square error 1/3 − 1/4 of 1/3."""
    np.testing.assert_allclose(generator.lloyd_max(1, 3), [0.5], rtol=1e-12)
    np.testing.assert_allclose(generator.distortion(np.array([0.5]), 3), 0.25, rtol=1e-12)


def test_a_lloyd_max_codebook_is_a_least_of_the_distortion():
    centroids = generator.lloyd_max(3, 96)
    least = generator.distortion(centroids, 96)
    for step in np.concatenate([np.eye(4), -np.eye(4)]) * 1e-4:
        assert generator.distortion(centroids + step, 96) > least


def test_the_source_is_the_frozen_file(monkeypatch):
    from pathlib import Path

    from rotquant_tvm.formats import codebook_tables

    monkeypatch.setattr(generator, "HEAD_DIMS", (64,))
    lines = generator.source().splitlines()
    frozen = Path(codebook_tables.__file__).read_text()
    assert frozen.startswith(lines[0]) and "\n".join(lines[3:8]) in frozen
