"""Linear layers on CUDA against float64 products: simulated, compiled, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules import dependent_launch_cuda
from rotquant_tvm.schedules.linear_cuda import FEW, MANY, WARPGROUPS, CUDALinear, cuda_linear
from rotquant_tvm.schedules.linear_few_rows_cuda import FewRows
from rotquant_tvm.schedules.linear_many_rows_cuda import ManyRows
from rotquant_tvm.schedules.linear_warpgroups_cuda import has_warpgroups, warpgroup_knobs

from rotquant_tvm.codegen import compile_module

from ..ops.conftest import has_gpu
from .cuda_targets import cubin, target_of, this_gpu
from .simulated_tensor_cores import TensorCoreGPU

SPECS = {
    "one": CUDALinear(128, (40,), (False,)),
    "three": CUDALinear(64, (24, 16, 8), (True, False, True)),
    "odd": CUDALinear(64, (33, 7), (False, True), leading=1),
    "residual": CUDALinear(192, (48,), (True,), residual=True),
    "gated": CUDALinear(64, (24, 24), (False, False), gated=True),
    "gated-odd": CUDALinear(64, (13, 13), (False, False), gated=True),
    "wide": CUDALinear(64, (20,), (False,), residual=True, output_dtype="float32"),
}
SMALL_MANY = ManyRows(32, 32, 16, 16, stages=2)
requires_gpu = pytest.mark.skipif(not has_gpu(), reason="no CUDA device")


def arguments(spec, rows, rng):
    """Arrays of a launch, its results full of NaN."""
    lead = (rows,) if spec.leading == 1 else (rows, 1) if rows % 2 else (2, rows // 2)

    def normal(shape, dtype="float16"):
        return rng.standard_normal(shape).astype(dtype)

    x = normal((*lead, spec.in_features))
    weight = (normal((sum(spec.out_features), spec.in_features)) / np.sqrt(spec.in_features)).astype("float16")
    biases = [normal((n,), spec.output_dtype) for n, has in zip(spec.out_features, spec.bias, strict=True) if has]
    residual = [normal((*lead, spec.out_features[0]), spec.output_dtype)] if spec.residual else []
    results = [np.full((*lead, n), np.nan, spec.output_dtype) for n in spec.outputs]
    return [x, weight, *biases, *residual, *results]


def reference(spec, arrays):
    """The results in float64."""
    x, weight, *rest = (array.astype("float64") for array in arrays[: len(arrays) - len(spec.outputs)])
    parts = np.split(x @ weight.T, np.cumsum(spec.out_features)[:-1], axis=-1)
    parts = [part + rest.pop(0) if has else part for part, has in zip(parts, spec.bias, strict=True)]
    if spec.gated:
        parts = [parts[0] / (1 + np.exp(-parts[0])) * parts[1]]
    return [part + rest[0] if spec.residual else part for part in parts]


def check(spec, arrays):
    for actual, exact in zip(arrays[-len(spec.outputs) :], reference(spec, arrays), strict=True):
        tolerance = 2e-3 if spec.output_dtype == "float16" else 1e-5
        np.testing.assert_allclose(actual.astype("float64"), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("name", SPECS)
def test_few_rows(name, rows):
    knobs = FewRows(8, tiles=1, warps=2, steps=2, stages=2)
    spec, arrays = SPECS[name], arguments(SPECS[name], rows, np.random.default_rng(rows))
    TensorCoreGPU(cuda_linear(spec, target_of("sm_90a"), (knobs,), (SMALL_MANY,)))(*arrays)
    check(spec, arrays)


OTHER_KNOBS = [
    FewRows(16, 2, 3, 1, 3),
    FewRows(16, 1, 4, 2, 4),
    FewRows(24, 3, 1, 4, 2),
    FewRows(16, 2, 16, 1, 3, ahead=True),  # more warps than there are inputs for
    FewRows(16, 1, 1, 2, 2, ahead=True),
]


@pytest.mark.parametrize("knobs", OTHER_KNOBS, ids=str)
@pytest.mark.parametrize("name", ["three", "gated", "residual"])
def test_few_rows_with_other_knobs(name, knobs):
    spec, arrays = SPECS[name], arguments(SPECS[name], 13, np.random.default_rng(0))
    TensorCoreGPU(cuda_linear(spec, target_of("sm_80"), (knobs,), (SMALL_MANY,)))(*arrays)
    check(spec, arrays)


@pytest.mark.parametrize("rows", [1, 31, 70])
@pytest.mark.parametrize("name", SPECS)
def test_many_rows(name, rows):
    spec, arrays = SPECS[name], arguments(SPECS[name], rows, np.random.default_rng(rows))
    TensorCoreGPU(cuda_linear(spec, target_of("sm_80"), (), (SMALL_MANY,)))(*arrays)
    check(spec, arrays)


@pytest.mark.parametrize("name", SPECS)
def test_warpgroups(name):
    spec, arrays = SPECS[name], arguments(SPECS[name], 130, np.random.default_rng(0))
    TensorCoreGPU(cuda_linear(spec, target_of("sm_90a"), (), (warpgroup_knobs(128, 32, 3),)))(*arrays)
    check(spec, arrays)


def test_of_as_many_rows_the_first_kernel_that_fits():
    spec, target = CUDALinear(64, (16,), (False,)), target_of("sm_86")
    fits, large = FewRows(16, 1, 1, 1, 2), FewRows(16, 2, 16, 2, 8)
    assert fits.shared_bytes(64) < 101376 < large.shared_bytes(64)
    alone = cuda_linear(spec, target, (fits,), (SMALL_MANY,))
    for few in ((large, fits), (fits, FewRows(16, 1, 2, 1, 2))):
        tvm.ir.assert_structural_equal(cuda_linear(spec, target, few, (SMALL_MANY,)), alone)


def test_the_rows_choose_the_kernel():
    spec = CUDALinear(64, (16,), (False,))
    kernel = cuda_linear(spec, target_of("sm_80"), (FewRows(8, 1, 1, 1, 2), FewRows(16, 1, 1, 1, 2)), (SMALL_MANY,))
    for rows in (8, 9, 16, 17, 40):
        arrays = arguments(spec, rows, np.random.default_rng(rows))
        TensorCoreGPU(kernel)(*arrays)
        check(spec, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three", "gated"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
def test_it_compiles(name, arch):
    def build(target):
        return cuda_linear(SPECS[name], target, FEW[1:], WARPGROUPS[1:] if has_warpgroups(target) else MANY)

    assert cubin(build, arch)


def test_tiles_fit_the_shared_memory():
    for arch, limit in (("sm_80", 166912), ("sm_86", 101376), ("sm_90a", 232448)):
        kernel = cuda_linear(SPECS["one"], target_of(arch)).script()
        lines = [line for line in kernel.splitlines() if "shared_" in line and "alloc_buffer" in line]
        sizes = [int(line.split("alloc_buffer((")[1].split(",")[0]) for line in lines]
        words = [4 if "uint32" in line else 2 for line in lines]
        assert sizes and all(bytes_ * size <= limit for bytes_, size in zip(words, sizes, strict=True))


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 64, 65, 200, 513])
@pytest.mark.parametrize("name", [*SPECS, "large", "large-gated"])
def test_on_a_gpu(name, rows, early, monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", early)
    cuda_linear.cache_clear()
    large = {
        "large": CUDALinear(4096, (4096, 1024, 1024), (False,) * 3),
        "large-gated": CUDALinear(1024, (2816, 2816), (False, False), gated=True),
    }
    spec = large.get(name) or SPECS[name]
    target = this_gpu()
    variants = [(FEW, MANY)]
    if rows > 64:
        variants += [((), (knobs,)) for knobs in MANY]
        variants += [((), (knobs,)) for knobs in WARPGROUPS if has_warpgroups(target)]
    for few, many in variants:
        kernel = cuda_linear(spec, target, few, many).with_attr("global_symbol", "kernel")
        run = compile_module(tvm.IRModule({"kernel": kernel}), target)["kernel"]
        arrays = arguments(spec, rows, np.random.default_rng(rows))
        tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
        run(*tensors)
        check(spec, [*arrays[: -len(spec.outputs)], *(tensor.numpy() for tensor in tensors[-len(spec.outputs) :])])
