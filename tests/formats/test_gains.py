"""Each gain rule does what it is for, on real codes; METHODS §5 has the figures."""

import numpy as np
import pytest

from rotquant_tvm.formats import GAIN_RULES, HALF_MAX, KVFormat
from rotquant_tvm.formats.gains import half_gain


@pytest.fixture(scope="module")
def units():
    """x uniform on the sphere, and y at cosine 0.5 to x: float64 [20000, 128] each."""
    x, z = np.random.default_rng(11).standard_normal((2, 20_000, 128))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    z -= (z * x).sum(1, keepdims=True) * x
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return x, 0.5 * x + np.sqrt(0.75) * z


def approximate(x, bits, gain):
    codec = KVFormat.parse(f"hurwitz{bits}:{gain}").codec(128, seed=1)
    return codec.decode(codec.encode(x))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, {"raw": 0.1162, "norm": 0.1190, "ip": 0.1308, "mse": 0.1154}),
        (3, {"raw": 0.0341, "norm": 0.0339, "ip": 0.0348, "mse": 0.0336}),
        (4, {"raw": 0.0094, "norm": 0.0092, "ip": 0.0093, "mse": 0.0092}),
    ],
)
def test_distortion_of_each_rule(units, bits, expected):
    x, _ = units
    found = {gain: ((x - approximate(x, bits, gain)) ** 2).sum(1).mean() for gain in expected}
    assert found == pytest.approx(expected, rel=0.02)
    assert found["mse"] == min(found.values())


@pytest.mark.parametrize(
    ("bits", "slopes"),
    [
        (2, {"raw": 0.885, "norm": 0.941, "ip": 1.0}),
        (3, {"raw": 0.967, "norm": 0.983, "ip": 1.0}),
        (4, {"raw": 0.991, "norm": 0.995, "ip": 1.0}),
    ],
)
def test_slope_of_inner_products(units, bits, slopes):
    x, y = units
    found = {gain: (approximate(x, bits, gain) * y).sum(1).mean() / 0.5 for gain in slopes}
    assert found == pytest.approx(slopes, abs=0.002)


@pytest.mark.parametrize("bits", [1, 3])
def test_what_each_rule_keeps_exactly(bits):
    """Up to the fp16 rounding of the gain (1/2048)."""
    x = np.random.default_rng(5).standard_normal((200, 128)) * 3
    rho = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(np.linalg.norm(approximate(x, bits, "norm"), axis=1), rho, rtol=5e-4)
    np.testing.assert_allclose((approximate(x, bits, "ip") * x).sum(1), rho**2, rtol=5e-4)
    best = approximate(x, bits, "mse")
    residual = ((x - best) * best).sum(1) / rho**2
    np.testing.assert_allclose(residual, 0.0, atol=5e-4)
    codec = KVFormat.parse(f"hurwitz{bits}:raw").codec(128)
    np.testing.assert_allclose(codec.encode(x).gain[:, 0], rho, rtol=5e-4)


def test_degenerate_products_are_defined():
    """⟨u, q⟩ ≤ 0 does not happen with our codebooks; a kernel that meets it must still agree."""
    rho, q = np.array([2.0, 0.0]), np.array([[0.5, 0.5], [0.5, 0.5]])
    y = np.array([[-1.0, -1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(half_gain(GAIN_RULES["mse"](rho, y, q)), [0.0, 0.0])
    np.testing.assert_array_equal(half_gain(GAIN_RULES["ip"](rho, y, q)), [2.0, 0.0])


def test_gains_saturate_and_never_turn_negative():
    np.testing.assert_array_equal(half_gain(np.array([-1.0, 0.0, 1e9])), [0.0, 0.0, HALF_MAX])
    assert half_gain(np.array([1.0])).dtype == np.float16
