"""The knob of linear layers on CPUs: micro kernels of any number of rows compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from rotquant_tvm.schedules.knobs import with_knobs
from rotquant_tvm.schedules.linear_llvm import PackedLinear, pack_weight, packed_linear
from rotquant_tvm.schedules.linear_rule_llvm import KNOBS, knobs_at, linear_rule_llvm, linear_shape
from rotquant_tvm.schedules.vector_target import VectorTarget

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops.linear import linear
from rotquant_tvm.target import resolve_target

from ..sampling import sampled

SPEC = PackedLinear(24, (40,), (True,), leading=1, tile=16)


@pytest.fixture(scope="module")
def target():
    return resolve_target("llvm -mcpu=x86-64-v3")


@pytest.mark.parametrize("rows", sampled(list(KNOBS["rows"]), [3, 12]))
def test_every_choice(rows, target):
    kernel = linear_rule_llvm(with_knobs(linear(linear_shape(SPEC)), {"rows": rows}), target)
    run = compile_module(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target)["main"]
    rng = np.random.default_rng(rows)
    weight, bias = rng.standard_normal((40, 24)).astype("float32"), rng.standard_normal(40).astype("float32")
    for count in (1, 7, 2 * rows):
        x = rng.standard_normal((count, 24)).astype("float32")
        y = tvm.runtime.tensor(np.full((count, 40), np.nan, "float32"))
        run(*(tvm.runtime.tensor(a) for a in (x, pack_weight(weight, 16), bias)), y)
        np.testing.assert_allclose(y.numpy(), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_without_a_choice_the_kernel_is_the_passes_own(target):
    expected = packed_linear(SPEC, VectorTarget.of(target)).with_attrs(linear_shape(SPEC).attrs())
    assert tvm_ffi.structural_equal(linear_rule_llvm(linear(linear_shape(SPEC)), target), expected)


def test_a_single_row_has_no_knobs():
    assert knobs_at({"d0": 1, "d1": 1}) == () and knobs_at({"d0": 1, "d1": 2}) == ("rows",)
