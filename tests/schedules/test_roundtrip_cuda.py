"""The CUDA kernel of roundtrip: what quantize and dequantize give, on a simulated GPU and on a real one."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules import roundtrip_cuda
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from rotquant_tvm.schedules.roundtrip_cuda import KNOBS, build

from rotquant_tvm.ops import roundtrip
from rotquant_tvm.ops.codec_shape import CodecShape

from ..sampling import sampled
from .simulated_gpu import cuda_target
from .vector_cases import AXES, CASES, PLAIN, codec_of, compile_cubin, encode, kernel, run, target_of, vectors, with_gpu

TABLES = [("iso2", 128, "float16", {"table": 1}), ("rotor4", 96, "float32", {"table": 0, "blocks": 1})]


def roundtrip_of(codec, x, knobs, where):
    """``roundtrip`` of x [n0, n1, n2, d] into a poisoned output."""
    func = kernel("roundtrip", codec, str(x.dtype), knobs, target_of(where))
    return run(func, where, x, codec.coefficients, codec.inverse_coefficients, np.full_like(x, np.nan))[3]


@pytest.mark.parametrize(("text", "head_dim", "dtype", "knobs", "where"), with_gpu(*CASES, *TABLES, *PLAIN))
def test_it_is_quantize_then_dequantize(text, head_dim, dtype, knobs, where):
    codec = codec_of(text, head_dim)
    for shape in ((1, 1, 1), (1, 2, 7)):
        x = vectors(head_dim, dtype, int(np.prod(shape))).reshape(*shape, head_dim)
        y = roundtrip_of(codec, x, knobs, where)
        flat = x.reshape(-1, head_dim)
        encoded = encode(codec, flat, {k: v for k, v in knobs.items() if k != "table"}, where)
        expected = codec.decode(encoded).reshape(x.shape)
        size = np.linalg.norm(x.astype(float), axis=-1, keepdims=True)
        apart = np.abs(y - expected) > (1e-5 if dtype == "float32" else 1e-3) * size + 6e-8
        assert apart.any(-1).sum() <= 1  # a code on a boundary
        if codec.format.bits > 4:
            continue
        exact = ((x - codec.decode(codec.encode(x))) ** 2).sum()
        assert ((x - y.astype(float)) ** 2).sum() == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype", "where"),
    with_gpu(("iso4", 128, "float16"), ("planar3", 80, "float32"), ("rotor2:ip", 64, "float16")),
)
@pytest.mark.parametrize("count", [3, 4, 5, 19])
def test_many_vectors_give_the_same(monkeypatch, text, head_dim, dtype, where, count):
    """The launch for many, from four on, and that for few."""
    codec, x = codec_of(text, head_dim), vectors(head_dim, dtype, count)[None, None]
    wanted = roundtrip_of(codec, x, {"rows": 1}, where)
    monkeypatch.setattr(roundtrip_cuda, "MANY", 4)
    np.testing.assert_array_equal(roundtrip_of(codec, x, {}, where), wanted)


@pytest.mark.parametrize(("text", "head_dim", "launches"), [("iso3", 128, 2), ("hurwitz3", 128, 1), ("iso3", 512, 1)])
def test_a_launch_for_many_where_it_gains(text, head_dim, launches):
    func = build(CodecShape.describe(codec_of(text, head_dim), "float16"), target_of(""))
    assert str(func).count("blockIdx.x") == launches


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype", "where"), with_gpu(("iso3", 80, "float16"), ("rotor1", 64, "float32"))
)
def test_vectors_that_are_not_numbers_stay_alone(text, head_dim, dtype, where):
    codec = codec_of(text, head_dim)
    x = vectors(head_dim, dtype, 8).reshape(1, 2, 4, head_dim)
    bad = x.copy()
    bad[0, 0, 1], bad[0, 1, 0, 3], bad[0, 1, 2] = np.nan, np.inf, 0
    y = roundtrip_of(codec, bad, {}, where)
    assert np.isfinite(y).all() and (y[0, 0, 1] == 0).all() and (y[0, 1, 2] == 0).all()
    clean = roundtrip_of(codec, x, {}, where).reshape(8, -1)
    for row in (0, 2, 3, 5, 7):
        np.testing.assert_array_equal(y.reshape(8, -1)[row], clean[row])


@pytest.mark.parametrize("arch", sampled(["sm_80", "sm_90a"], ["sm_90a"]))
def test_kernels_compile(arch):
    cases = [*CASES, *TABLES, *PLAIN]
    compile_cubin([kernel("roundtrip", codec_of(t, d), dtype, k, cuda_target(arch)) for t, d, dtype, k in cases], arch)


def test_every_knob_is_a_parameter_of_the_kernel():
    shape = CodecShape.describe(codec_of("iso3", 128), "float16")
    for name, values in KNOBS.items():
        assert all(build(shape, target_of(""), **{name: value}) is not None for value in values)


@pytest.mark.parametrize(("text", "head_dim"), [("iso3", 512), ("rotor2:ip", 80), ("hurwitz4", 256), ("turbo1", 64)])
def test_the_rule_takes_what_has_been_compared_on_a_gpu(text, head_dim):
    assert gpu_kernel(roundtrip(codec_of(text, head_dim), "float16", AXES), target_of("")) is not None


@pytest.mark.parametrize("text", ["dense3", "turbo3+qjl", "turbo2.5", "rq2", "q8_0", "f16", "qjl1"])
def test_it_declines_what_it_does_not_know(text):
    assert gpu_kernel(roundtrip(codec_of(text, 128), "float16", AXES), target_of("")) is None
