from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from rotquant_tvm.schedules.serial_when_small import serial_when_small
from rotquant_tvm.schedules.vector_math import vectorizable_math
from tvm.script import tirx as T

LANES = 16
TINY = float(np.finfo("float32").smallest_normal)


def elementwise(op, dtype="float32"):
    """A PrimFunc y = op(x) over whole vectors, rewritten."""

    @T.prim_func(s_tir=True)
    def func(px: T.handle, py: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(px, (n,), dtype)
        y = T.match_buffer(py, (n,), dtype)
        for i in range(n // LANES):
            for lane in T.vectorized(LANES):
                y[i * LANES + lane] = op(x[i * LANES + lane])

    return vectorizable_math(func)


def apply(run, op, values, dtype="float32"):
    x = np.asarray(values, dtype)
    padded = np.concatenate([x, np.zeros(-len(x) % LANES, dtype)])
    return run(elementwise(op, dtype), padded, np.empty_like(padded))[0][: len(x)]


def relative_error(actual, exact):
    return np.abs(actual.astype("float64") - exact) / np.abs(exact)


def sample(low, high, count=200_000):
    return np.random.default_rng(0).uniform(low, high, count).astype("float32")


def sigmoid64(x):
    return 1 / (1 + np.exp(-x))


ERF64 = np.vectorize(math.erf)
FUNCTIONS = {
    "exp": (T.exp, np.exp, (-87.3, 88.7), 1.2e-7),
    "sigmoid": (T.sigmoid, sigmoid64, (-87, 90), 2e-7),
    "tanh": (T.tanh, np.tanh, (-12, 12), 3e-7),
    "erf": (T.erf, ERF64, (-5, 5), 3e-7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_over_the_whole_range(name, run):
    op, exact, (low, high), bound = FUNCTIONS[name]
    x = np.concatenate([sample(low, high), sample(-1, 1), sample(-1e-3, 1e-3, 1000)])
    assert relative_error(apply(run, op, x), exact(x.astype("float64"))).max() < bound


def test_no_libm_call_is_left():
    for name, (op, *_) in FUNCTIONS.items():
        assert f"T.{name}(" not in elementwise(op).script()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name, run):
    op, exact, *_ = FUNCTIONS[name]
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40, -1e-40], "float32")
    with np.errstate(over="ignore"):
        expected = exact(x.astype("float64")).astype("float32")
    actual = apply(run, op, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=0)


def test_exp_overflows_to_infinity_and_underflows_through_subnormals_to_zero(run):
    edge = np.float32(88.72283)  # the largest float32 whose exp is finite
    high, over = apply(run, T.exp, [edge, np.nextafter(edge, np.float32(100))])
    assert np.isfinite(high) and np.isinf(over)
    x = sample(-103.9, -87.4, 20_000)
    exact = np.exp(x.astype("float64"))
    subnormal = float(np.finfo("float32").smallest_subnormal)
    assert np.abs(apply(run, T.exp, x).astype("float64") - exact).max() <= 0.51 * subnormal + 1.2e-7 * TINY
    assert (apply(run, T.exp, [-104.0, -110.0, -1e4]) == 0).all()


@pytest.mark.parametrize(("exponent", "exact"), [(2.0, np.square), (3.0, lambda x: x**3), (0.5, np.sqrt)])
def test_powers_are_products(exponent, exact, run):
    x = sample(0, 50, 1000)

    def power(value):
        return T.pow(value, T.float32(exponent))

    assert "T.pow(" not in elementwise(power).script()
    assert relative_error(apply(run, power, x), exact(x.astype("float64"))).max() < 2e-7


def test_another_power_stays(run):
    def power(value):
        return T.pow(value, T.float32(1.7))

    assert "T.pow(" in elementwise(power).script()


def test_float16_is_computed_in_float32(run):
    x = sample(-9, 9, 1000).astype("float16")
    expected = np.exp(x.astype("float64")).astype("float16")
    np.testing.assert_allclose(apply(run, T.exp, x, "float16"), expected, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=64))
def test_sigmoid_is_between_zero_and_one_and_monotonic(values):
    import tvm

    global _SIGMOID  # compiled once: hypothesis and function-scoped fixtures do not mix
    if "_SIGMOID" not in globals():
        func = elementwise(T.sigmoid).with_attr("global_symbol", "main")
        _SIGMOID = tvm.compile(tvm.IRModule({"main": func}), "llvm")["main"]
    x = np.sort(np.array([v for v in values if not math.isnan(v)], "float32"))
    padded = np.concatenate([x, np.zeros(-len(x) % LANES, "float32")])
    y = tvm.runtime.tensor(np.empty_like(padded))
    _SIGMOID(tvm.runtime.tensor(padded), y)
    result = y.numpy()[: len(x)].astype("float64")
    assert ((result >= 0) & (result <= 1)).all()
    assert (np.diff(result) >= -2e-7).all()


def test_a_function_of_a_widened_bfloat16():
    """Twice over, as in the two branches of a small and a large size."""

    @T.prim_func(s_tir=True)
    def func(px: T.handle, pb: T.handle, py: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(px, (n,), "float32")
        b = T.match_buffer(pb, (n,), "bfloat16")
        y = T.match_buffer(py, (n,), "float32")
        for i in range(n // LANES):
            for lane in T.vectorized(LANES):
                y[i * LANES + lane] = T.tanh(x[i * LANES + lane] + T.Cast("float32", b[i * LANES + lane]))

    rng = np.random.default_rng(0)
    x, b = rng.standard_normal((2, 64)).astype("float32")
    tensors = [tvm.runtime.tensor(a) for a in (x, b.astype(ml_dtypes.bfloat16), np.empty_like(x))]
    rewritten = serial_when_small(vectorizable_math(func)).with_attr("global_symbol", "main")
    tvm.compile(tvm.IRModule({"main": rewritten}), "llvm")["main"](*tensors)
    exact = np.tanh(x.astype(float) + b.astype(ml_dtypes.bfloat16).astype(float))
    np.testing.assert_allclose(tensors[2].numpy(), exact, rtol=1e-6, atol=1e-6)
