"""The knobs of linear layers on CUDA: every choice that the rule takes is a right kernel."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tvm
import tvm_ffi
from rotquant_tvm.schedules.knobs import knob_values, with_knobs
from rotquant_tvm.schedules.linear_cuda import CUDALinear, cuda_linear
from rotquant_tvm.schedules.linear_rule_cuda import KNOBS, knobs_at, linear_rule_cuda, linear_shape
from rotquant_tvm.schedules.model_kernels import model_kernel

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops.linear import linear

from ..ops.conftest import has_gpu
from ..sampling import sampled
from .cuda_targets import cubin, target_of, this_gpu
from .simulated_tensor_cores import TensorCoreGPU
from .test_linear_cuda import arguments, check

SPEC = CUDALinear(256, (40, 24), (True, False))


def choices(*names):
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(KNOBS[name] for name in names))]


FEW = choices("few_tiles", "few_warps", "few_steps", "few_stages")
MANY = choices("warpgroups", "largest", "stages")
random.Random(0).shuffle(FEW)


def definition(spec=SPEC):
    return linear(linear_shape(spec))


def test_without_a_choice_the_kernel_is_the_passes_own():
    target = target_of("sm_90a")
    expected = cuda_linear(SPEC, target).with_attrs(linear_shape(SPEC).attrs())
    assert tvm_ffi.structural_equal(linear_rule_cuda(definition(), target), expected)


def test_which_knobs_matter():
    assert set(knobs_at({"d0": 1, "d1": 1})) == set(knobs_at({"d0": 8})) == {n for n in KNOBS if n.startswith("few_")}
    assert set(knobs_at({"d0": 2, "d1": 4096})) == {"warpgroups", "largest", "stages"} and knobs_at({"d0": 12}) == ()
    assert set(knob_values(linear_rule_cuda, {"d0": 1, "d1": 4096})) == {"warpgroups", "largest", "stages"}
    assert knob_values(linear_rule_cuda) == KNOBS


@pytest.mark.parametrize("knobs", sampled(FEW, FEW[:2]), ids=str)
def test_few_rows(knobs):
    kernel = linear_rule_cuda(with_knobs(definition(), knobs), target_of("sm_90a"))
    if kernel is None:
        assert knobs["few_warps"] * knobs["few_stages"] * knobs["few_tiles"] * knobs["few_steps"] >= 128
        return
    arrays = arguments(SPEC, 3, np.random.default_rng(0))
    TensorCoreGPU(kernel)(*arrays)
    check(SPEC, arrays)


def test_what_does_not_fit_is_declined():
    large = {"few_tiles": 2, "few_warps": 16, "few_steps": 4, "few_stages": 4}
    assert linear_rule_cuda(with_knobs(definition(), large), target_of("sm_90a")) is None
    assert linear_rule_cuda(with_knobs(definition(), {"warpgroups": 1}), target_of("sm_80")) is None
    whole = {"warpgroups": 0, "largest": 0, "stages": 4}
    assert linear_rule_cuda(with_knobs(definition(), whole), target_of("sm_86")) is None
    assert linear_rule_cuda(with_knobs(definition(), whole | {"largest": 2, "stages": 3}), target_of("sm_86"))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("knobs", [*FEW[:4], *MANY], ids=str)
def test_they_compile(knobs):
    def build(target):
        return linear_rule_cuda(with_knobs(definition(), knobs), target)

    if build(target_of("sm_90a")) is not None:
        assert cubin(build, "sm_90a")


def test_the_kernel_keeps_the_choice_and_its_name():
    func = with_knobs(definition(), {"few_warps": 4}).with_attr("global_symbol", "linear7")
    kernel = model_kernel(func, target_of("sm_90a"))
    assert kernel.attrs["global_symbol"] == "linear7" and "few_warps" in str(kernel.attrs["rotquant.knobs"])


@pytest.mark.skipif(not has_gpu(), reason="no CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "knobs"), [*((5, knobs) for knobs in FEW[:12]), *((300, knobs) for knobs in MANY)])
def test_on_a_gpu(rows, knobs):
    kernel = model_kernel(with_knobs(definition(), knobs).with_attr("global_symbol", "kernel"), this_gpu())
    if kernel is None:
        pytest.skip("the rule has no kernel for these knobs here")
    run = compile_module(tvm.IRModule({"kernel": kernel}), this_gpu())["kernel"]
    arrays = arguments(SPEC, rows, np.random.default_rng(rows))
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
    run(*tensors)
    count = len(SPEC.outputs)
    check(SPEC, [*arrays[:-count], *(tensor.numpy() for tensor in tensors[-count:])])
