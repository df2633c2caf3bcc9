"""The CUDA kernel of quantize against NumPy, on a simulated GPU and on a real one."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel

from rotquant_tvm.ops import quantize

from ..ops.reference import check_encoding
from ..sampling import sampled
from .simulated_gpu import cuda_target
from .vector_cases import AXES, CASES, PLAIN, codec_of, compile_cubin, encode, kernel, target_of, vectors, with_gpu


@pytest.mark.parametrize(("text", "head_dim", "dtype", "knobs", "where"), with_gpu(*CASES, *PLAIN))
def test_codes_and_gains_are_the_formats(text, head_dim, dtype, knobs, where):
    codec = codec_of(text, head_dim)
    for count in (1, 13):
        x = vectors(head_dim, dtype, count)
        check_encoding(codec, x, encode(codec, x, knobs, where))


def awkward(head_dim, dtype):
    """Rows of zeros, NaN, Inf and numbers beyond float16 between others; the others' numbers are 0, 3 and from 8 on."""
    x = vectors(head_dim, dtype, 12)
    x[1], x[2], x[4], x[6] = 0, -np.inf, np.nan, -0.0
    x[5, head_dim // 2], x[7, 1] = np.nan, np.inf
    return x, [0, 3, *range(8, 12)]


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype", "knobs", "where"),
    with_gpu(
        ("iso3", 128, "float16", {}),
        ("planar1", 80, "float32", {"rows": 2}),
        ("rotor2:ip", 80, "float16", {}),
        ("q4_0", 80, "float32", {}),
        ("bf16", 64, "float32", {}),
    ),
)
def test_every_input_has_the_defined_result_and_spoils_no_other(text, head_dim, dtype, knobs, where):
    codec = codec_of(text, head_dim)
    x, others = awkward(head_dim, dtype)
    if dtype == "float32":
        x[7, 2] = -3e38
    found = encode(codec, x, knobs, where)
    check_encoding(codec, x, found, ties=True)
    clean = encode(codec, np.where(np.isin(np.arange(12), others)[:, None], x, 1).astype(dtype), knobs, where)
    np.testing.assert_array_equal(found.codes[others], clean.codes[others])
    np.testing.assert_array_equal(found.gain[others], clean.gain[others])


@pytest.mark.parametrize("arch", sampled(["sm_80", "sm_90a"], ["sm_90a"]))
def test_kernels_compile(arch):
    cases = [*CASES, *PLAIN]
    compile_cubin([kernel("quantize", codec_of(t, d), dtype, k, cuda_target(arch)) for t, d, dtype, k in cases], arch)


@pytest.mark.parametrize(("text", "head_dim"), [("iso3", 512), ("rotor2:ip", 80), ("hurwitz4", 256), ("turbo1", 64)])
def test_the_rule_takes_what_has_been_compared_on_a_gpu(text, head_dim):
    assert gpu_kernel(quantize(codec_of(text, head_dim), "float16", AXES), target_of("")) is not None


@pytest.mark.parametrize("text", ["dense3", "turbo3+qjl", "turbo2.5", "rq2", "q8_0", "f16", "qjl1"])
def test_it_declines_what_it_does_not_know(text):
    assert gpu_kernel(quantize(codec_of(text, 128), "float16", AXES), target_of("")) is None
