"""The knobs of TVM's own loops on CPUs: any choice computes the same, and without one nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from rotquant_tvm.schedules.knobs import with_knobs
from rotquant_tvm.schedules.loops_llvm import loops_llvm
from rotquant_tvm.schedules.schedule_for_llvm import schedule

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops.rms_norm import rms_norm
from rotquant_tvm.target import resolve_target


@pytest.fixture(scope="module")
def target():
    return resolve_target("llvm -mcpu=x86-64-v3")


@pytest.mark.parametrize("knobs", [{}, {"lanes": 4, "small": 0}, {"lanes": 16, "small": 1 << 20}], ids=str)
def test_choices_compute_the_same(knobs, target):
    scheduled = loops_llvm(with_knobs(rms_norm(64, 1e-5, 2), knobs), target)
    run = compile_module(tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")}), target)["main"]
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 64)).astype("float16"), rng.standard_normal(64).astype("float16")
    y = tvm.runtime.tensor(np.full((2, 5, 64), np.nan, "float16"))
    run(tvm.runtime.tensor(x), tvm.runtime.tensor(weight), y)
    wide = x.astype("float64")
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5) * weight.astype("float64")
    np.testing.assert_allclose(y.numpy().astype("float64"), exact, rtol=3e-3, atol=2e-3)


def test_the_choices_are_kernels_of_their_own(target):
    func = rms_norm(64, 1e-5, 2)
    kernels = [loops_llvm(with_knobs(func, knobs), target) for knobs in ({"lanes": 4}, {"lanes": 16}, {"small": 0})]
    hashes = {tvm_ffi.structural_hash(kernel.without_attr("rotquant.knobs")) for kernel in kernels}
    assert len(hashes) == 3
    assert tvm_ffi.structural_equal(loops_llvm(func, target), schedule(func, target))


def test_what_no_schedule_rule_takes_is_declined(target):
    from tvm import te

    a = te.placeholder((8,), "float32", "a")
    scan = te.extern(
        (8,), [a], lambda ins, outs: tvm.tirx.call_packed("f", ins[0], outs[0]), name="b", dtype="float32"
    )
    assert loops_llvm(te.create_prim_func([a, scan]), target) is None
