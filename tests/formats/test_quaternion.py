import numpy as np
import pytest

from rotquant_tvm.formats.quaternion import conjugate, left_matrix, random_units, right_matrix

ONE, QI, QJ, QK = np.eye(4)


@pytest.mark.parametrize(
    ("p", "q", "product"), [(QI, QJ, QK), (QJ, QK, QI), (QK, QI, QJ), (QJ, QI, -QK), (QI, QI, -ONE)]
)
def test_hamiltons_table(p, q, product):
    np.testing.assert_array_equal(left_matrix(p) @ q, product)
    np.testing.assert_array_equal(right_matrix(q) @ p, product)


def test_left_and_right_products_agree_commute_and_keep_norms():
    p, q, v = random_units(np.random.default_rng(0), 3)
    np.testing.assert_allclose(left_matrix(p) @ q, right_matrix(q) @ p, atol=1e-15)
    np.testing.assert_allclose(left_matrix(p) @ right_matrix(q), right_matrix(q) @ left_matrix(p), atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(left_matrix(p) @ v), 1.0)
    np.testing.assert_allclose(left_matrix(p) @ conjugate(p), ONE, atol=1e-15)
