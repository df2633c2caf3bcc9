"""RMS norms on CUDA against float64; what they replace is tested with the pass ``FuseRMSNorm``."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules import dependent_launch_cuda
from rotquant_tvm.schedules.knobs import with_knobs
from rotquant_tvm.schedules.rms_norm_cuda import rms_norm, rms_norm_cuda, takes_features

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops.rms_norm import rms_norm as rms_norm_definition

from ..ops.conftest import has_gpu
from .cuda_targets import cubin, target_of, this_gpu
from .simulated_tensor_cores import TensorCoreGPU

FEATURES = (8, 248, 576, 4096, 5120)


def case(rows, features):
    rng = np.random.default_rng(rows)
    x, weight = rng.standard_normal((rows, features)).astype("float16"), rng.standard_normal(features).astype("float16")
    wide = x.astype("float64")
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5) * weight.astype("float64")
    return [x, weight, np.full((rows, features), np.nan, "float16")], exact


@pytest.mark.parametrize("features", FEATURES)
def test_simulated(features):
    arrays, exact = case(3, features)
    TensorCoreGPU(rms_norm(features, 1e-5, 1, target_of("sm_90a")))(*arrays)
    np.testing.assert_allclose(arrays[-1].astype("float64"), exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [64, 1024])
def test_the_knob(threads):
    """Blocks of fewer threads take several turns."""
    arrays, exact = case(2, 4096)
    definition = with_knobs(rms_norm_definition(4096, 1e-5, 1), {"threads": threads})
    TensorCoreGPU(rms_norm_cuda(definition, target_of("sm_90a")))(*arrays)
    np.testing.assert_allclose(arrays[-1].astype("float64"), exact, rtol=2e-3, atol=1e-3)


def test_rows_of_whole_accesses_alone():
    assert takes_features(8) and not takes_features(12)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_it_compiles(arch):
    assert cubin(lambda target: rms_norm(576, 1e-5, 2, target), arch)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no CUDA device")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_on_a_gpu(features, early, monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", early)
    target = this_gpu()
    kernel = rms_norm(features, 1e-5, 1, target).with_attr("global_symbol", "kernel")
    run = compile_module(tvm.IRModule({"kernel": kernel}), target)["kernel"]
    arrays, exact = case(301, features)
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
    run(*tensors)
    np.testing.assert_allclose(tensors[-1].numpy().astype("float64"), exact, rtol=2e-3, atol=1e-3)
