"""The vector helpers: exp2 over its range, and the lane sums."""

from __future__ import annotations

import numpy as np
import tvm
from rotquant_tvm.schedules.vector_ops import LANES, across, cast, exp2, lanes, register, side_by_side, sum_of_fours
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.target import host_target


def compiled(inputs: int, outputs: int, body):
    """A kernel of one float32 array in and one out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        x, y = T.arg("x", T.buffer((inputs,), "float32")), T.arg("y", T.buffer((outputs,), "float32"))
        with T.serial(0, 1) as _, T.sblock("all"):
            T.reads(x[0:inputs])
            T.writes(y[0:outputs])
            body(x, y)
    target = host_target()
    return tvm.compile(tvm.IRModule({"kernel": builder.get()}), target)["kernel"]


def apply(kernel, x, outputs):
    y = tvm.runtime.tensor(np.full(outputs, np.nan, "float32"))
    kernel(tvm.runtime.tensor(x.astype("float32")), y)
    return y.numpy()


def test_exp2():
    count = 4096
    x = np.concatenate([-np.geomspace(1e-8, 126, count // 2), -np.linspace(0, 126, count // 2)]).astype("float32")

    def body(source, target):
        with T.serial(0, count // LANES) as i:
            T.buffer_store(target, exp2(source[lanes(i * LANES)]), [lanes(i * LANES)])

    kernel = compiled(count, count, body)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(apply(kernel, x, count) / expected - 1).max() < 3e-7
    assert (apply(kernel, np.full(count, -1e30), count) <= 2.0**-126).all()


def test_sums():
    def body(source, target):
        T.buffer_store(target, sum_of_fours(source, 0), [lanes(0)])
        total = register()
        T.buffer_store(total, source[lanes(0)], [lanes(0)])
        across(total, lambda a, b: a + b)
        T.buffer_store(target, total[lanes(0)], [lanes(LANES)])

    x = np.random.default_rng(0).standard_normal(64).astype("float32")
    y = apply(compiled(64, 32, body), x, 32)
    np.testing.assert_allclose(y[:16], x.reshape(16, 4).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[16:], np.full(16, x[:16].sum()), rtol=1e-5, atol=1e-6)


def test_buffers_side_by_side_keep_apart():
    def body(source, target):
        shapes = (2, "float32"), (1, "int32"), (3, "float32")
        placed = list(zip(side_by_side(*shapes), (0, 2, 3), shapes, strict=True))
        for buffer, first, (count, dtype) in placed:
            for n in range(count):
                T.buffer_store(buffer, cast(source[lanes((first + n) * LANES)], dtype), [lanes(n * LANES)])
        for buffer, first, (count, _) in placed:
            for n in range(count):
                T.buffer_store(target, cast(buffer[lanes(n * LANES)], "float32"), [lanes((first + n) * LANES)])

    x = np.arange(96) + 0.5
    expected = np.concatenate([x[:32], np.floor(x[32:48]), x[48:]])
    np.testing.assert_array_equal(apply(compiled(96, 96, body), x, 96), expected)
