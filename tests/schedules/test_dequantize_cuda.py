"""The CUDA kernel of dequantize against NumPy, on a simulated GPU and on a real one."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel

from rotquant_tvm.formats import EncodedKV
from rotquant_tvm.ops import dequantize

from ..sampling import sampled
from .simulated_gpu import cuda_target
from .vector_cases import AXES, CASES, PLAIN, codec_of, compile_cubin, kernel, run, target_of, vectors, with_gpu


def stored(codec, count):
    """Codes of every value, and gains of several magnitudes; of formats without a rotation, encoded vectors."""
    if codec.codebook is None:
        return codec.encode(vectors(codec.head_dim, "float16", count))
    rng = np.random.default_rng(count)
    codes = rng.integers(0, 2**codec.format.bits, (count, codec.head_dim), np.uint8)
    return EncodedKV(codes, rng.choice([0, 1e-3, 1.0, 900.0], (count, 1)).astype(np.float16))


@pytest.mark.parametrize(("text", "head_dim", "dtype", "knobs", "where"), with_gpu(*CASES, *PLAIN))
def test_vectors_are_the_formats(text, head_dim, dtype, knobs, where):
    codec = codec_of(text, head_dim)
    func = kernel("dequantize", codec, dtype, knobs, target_of(where))
    for count in (1, 13):
        encoded = stored(codec, count)
        expected = codec.decode(encoded)
        gain = encoded.gain if codec.gains_per_vector else np.full((count, 1), np.nan, np.float16)
        poison = np.full((count, head_dim), np.nan, dtype)
        y = run(func, where, encoded.codes, gain, codec.inverse_coefficients, poison)[3]
        size = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(y - expected) <= (1e-6 if dtype == "float32" else 6e-4) * size + 6e-8).all()


@pytest.mark.parametrize("arch", sampled(["sm_80", "sm_90a"], ["sm_90a"]))
def test_kernels_compile(arch):
    cases = [*CASES, *PLAIN]
    compile_cubin([kernel("dequantize", codec_of(t, d), dtype, k, cuda_target(arch)) for t, d, dtype, k in cases], arch)


@pytest.mark.parametrize(("text", "head_dim"), [("iso3", 512), ("rotor2:ip", 80), ("hurwitz4", 256), ("turbo1", 64)])
def test_the_rule_takes_what_has_been_compared_on_a_gpu(text, head_dim):
    assert gpu_kernel(dequantize(codec_of(text, head_dim), "float16", AXES), target_of("")) is not None


@pytest.mark.parametrize("text", ["dense3", "turbo3+qjl", "turbo2.5", "rq2", "q8_0", "f16"])
def test_it_declines_what_it_does_not_know(text):
    assert gpu_kernel(dequantize(codec_of(text, 128), "float16", AXES), target_of("")) is None
