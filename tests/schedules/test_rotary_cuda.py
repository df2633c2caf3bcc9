"""Rotary embeddings on CUDA against NumPy; what they replace is tested with the pass ``FuseRotary``."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules import dependent_launch_cuda
from rotquant_tvm.schedules.rotary_cuda import RotaryShape, rotary

from rotquant_tvm.codegen import compile_module

from ..ops.conftest import has_gpu
from .cuda_targets import cubin, target_of, this_gpu
from .simulated_tensor_cores import TensorCoreGPU

SHAPES = [
    RotaryShape((4, 2), (False, True), 64),
    RotaryShape((3,), (True,), 80),
    RotaryShape((32, 8), (False, True), 128),
]


def case(shape, batch, seq):
    rng, d = np.random.default_rng(seq), shape.head_dim
    xs = [rng.standard_normal((batch, seq, heads, d)).astype("float16") for heads in shape.heads]
    cos, sin = (rng.standard_normal((batch, 1, seq, d)).astype("float16") for _ in range(2))
    results, exact = [], []
    for x, first in zip(xs, shape.heads_first, strict=True):
        wide = x.astype("float64").transpose(0, 2, 1, 3)
        y = wide * cos + np.concatenate([-wide[..., d // 2 :], wide[..., : d // 2]], -1) * sin
        exact.append(y if first else y.transpose(0, 2, 1, 3))
        results.append(np.full(exact[-1].shape, np.nan, "float16"))
    return [*xs, cos, sin, *results], exact


def check(arrays, exact):
    for actual, wanted in zip(arrays[-len(exact) :], exact, strict=True):
        np.testing.assert_allclose(actual.astype("float64"), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seq", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_simulated(shape, seq):
    arrays, exact = case(shape, 2, seq)
    TensorCoreGPU(rotary(shape, target_of("sm_90a")))(*arrays)
    check(arrays, exact)


def test_halves_of_whole_accesses_alone():
    assert not RotaryShape((1,), (True,), 24).fits and RotaryShape((1,), (True,), 80).fits


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_it_compiles(arch):
    assert cubin(lambda target: rotary(SHAPES[0], target), arch)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no CUDA device")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("seq", [1, 77])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, seq, early, monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", early)
    rotary.cache_clear()
    target = this_gpu()
    kernel = rotary(shape, target).with_attr("global_symbol", "kernel")
    run = compile_module(tvm.IRModule({"kernel": kernel}), target)["kernel"]
    arrays, exact = case(shape, 3, seq)
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
    run(*tensors)
    check([tensor.numpy() for tensor in tensors], exact)
