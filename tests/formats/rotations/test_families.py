"""What each family's definition says of its matrix, beyond being orthogonal."""

import numpy as np
import pytest

from rotquant_tvm.formats import Rotation


def hadamard(order):
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


def off_blocks(matrix, block):
    """The largest entry outside the diagonal blocks, a smaller tail block apart."""
    owner = np.arange(len(matrix)) // block
    return np.abs(matrix[owner[:, None] != owner]).max()


@pytest.mark.parametrize(("family", "block"), [("planar", 2), ("rotor", 3), ("iso", 4), ("iso-full", 4)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_published_families_turn_isolated_blocks(family, block, head_dim):
    matrix = Rotation.draw(family, head_dim, 5).matrix()
    assert off_blocks(matrix, block) == 0.0
    blocks = [matrix[i : i + block, i : i + block] for i in range(0, head_dim, block)]
    np.testing.assert_allclose([np.linalg.det(b) for b in blocks], 1.0)
    assert len({round(b[0, 0], 9) for b in blocks}) >= head_dim // block


@pytest.mark.parametrize(("head_dim", "tail"), [(64, 1), (80, 2), (96, 0), (128, 2)])
def test_rotor_keeps_its_tail_in_the_head(head_dim, tail):
    rest = Rotation.draw("rotor", head_dim, 1).matrix()[head_dim - tail :, head_dim - tail :]
    if tail == 1:
        np.testing.assert_array_equal(rest, [[1.0]])
    if tail == 2:
        np.testing.assert_allclose(rest[0], [rest[1, 1], -rest[1, 0]])
        assert 0.0 < abs(rest[0, 1]) < 1.0


def test_iso_is_left_isoclinic_and_full_is_not():
    """A left isoclinic rotation turns every vector by the same angle."""
    v = np.random.default_rng(0).standard_normal((50, 64))
    v[:, 4:] = 0
    v /= np.linalg.norm(v, axis=1, keepdims=True)

    def spread(family):
        return np.ptp((Rotation.draw(family, 64, 2).apply(v) * v).sum(1))

    assert spread("iso") < 1e-13
    assert spread("iso-full") > 0.1


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_turbo_is_a_hadamard_matrix_between_signs(head_dim):
    matrix = Rotation.draw("turbo", head_dim, 4).matrix() * np.sqrt(head_dim)
    np.testing.assert_allclose(np.abs(matrix), 1.0, atol=1e-12)
    signs = np.sign(matrix)
    first, last = signs[0], signs[:, 0] * signs[0, 0]
    np.testing.assert_array_equal(last[:, None] * signs * first, hadamard(head_dim))
    assert abs(first.sum()) < head_dim / 2
    assert abs(last.sum()) < head_dim / 2


def test_dense_is_the_sign_fixed_q_of_a_gaussian():
    """QᵀG must be upper triangular with a positive diagonal, for the G of the seed: then Q is Haar."""
    gaussian = np.random.Generator(np.random.Philox(np.random.SeedSequence(9))).standard_normal((64, 64))
    r = Rotation.draw("dense", 64, 9).matrix().T @ gaussian
    np.testing.assert_allclose(np.tril(r, -1), 0.0, atol=1e-12)
    assert (np.diagonal(r) > 0).all()


@pytest.mark.parametrize(
    ("head_dim", "strides"),
    [(64, (1, 4, 16)), (80, (1, 4, 20)), (96, (1, 4, 24)), (128, (1, 4, 32)), (256, (1, 4, 16, 64))],
)
def test_hurwitz_multiplies_by_units_of_halves_at_its_strides(head_dim, strides):
    rotation = Rotation.draw("hurwitz", head_dim, 6)
    assert rotation.structure == tuple((4, stride) for stride in strides)
    for layer in rotation.layers:
        np.testing.assert_array_equal(np.abs(layer.coefficients), 0.5)
        # L(q)ᵀ = L(q̄): a left product's first row and column differ in the signs of i, j, k only.
        row = layer.coefficients[0]
        column = layer.matrix[layer.reads[0], 0]
        np.testing.assert_array_equal(column, row * [1, -1, -1, -1])


@pytest.mark.parametrize("head_dim", [64, 256])
def test_log4_hurwitz_layers_mix_the_whole_head_evenly(head_dim):
    matrix = Rotation.draw("hurwitz", head_dim, 6).matrix()
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(head_dim), atol=1e-15)
