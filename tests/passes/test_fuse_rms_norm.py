from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.expand_power import ExpandPower
from rotquant_tvm.passes.fuse_rms_norm import FuseRMSNorm
from tvm import relax
from tvm.script import relax as R

from ..schedules.cuda_targets import target_of
from .simulated_function import calls, simulate

TARGET = target_of("sm_90a")
RNG = np.random.default_rng(0)


def norm(features, dtype="float16", epsilon=1e-5, axis=-1, swapped=False, shifted=False) -> tvm.IRModule:
    """An RMS norm as transformers exports it, with the square already a product."""
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 2, features), dtype))
    weight = relax.Var("weight", relax.TensorType((features,), dtype))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, weight]):
        with bb.dataflow():
            wide = bb.emit(R.astype(x, "float32"))
            square = bb.emit(R.multiply(wide, wide))
            mean = bb.emit(R.mean(square, axis=[axis], keepdims=True))
            inverse = bb.emit(R.rsqrt(bb.emit(R.add(mean, R.const(epsilon, "float32")))))
            factors = (inverse, wide) if swapped else (wide, inverse)
            rounded = bb.emit(R.astype(bb.emit(R.multiply(*factors)), dtype))
            scale = bb.emit(R.add(weight, R.const(1, dtype))) if shifted else weight
            out = bb.emit_output(R.multiply(rounded, scale) if swapped else R.multiply(scale, rounded))
        bb.emit_func_output(out)
    return bb.get()


@pytest.mark.parametrize("options", [{}, {"swapped": True}, {"epsilon": 0.1}, {"axis": 2}, {"shifted": True}], ids=str)
@pytest.mark.parametrize("features", [8, 264, 4096])
def test_it_becomes_one_kernel_and_the_numbers_stay(features, options):
    mod = norm(features, **options)
    after = FuseRMSNorm(TARGET)(mod)
    assert [name for name in calls(after["main"]) if name != "relax.add"] == ["rms_norm"]
    x = (0.3 * RNG.standard_normal((3, 2, features))).astype("float16")
    weight = RNG.standard_normal(features).astype("float16")
    actual, expected = (simulate(each, [x, weight]).astype("float32") for each in (after, mod))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"axis": 1}, {"dtype": "float32"}, {"features": 12}], ids=str)
def test_others_stay(options):
    mod = norm(**({"features": 16} | options))
    after = FuseRMSNorm(TARGET)(mod)
    assert "rms_norm" not in calls(after["main"])


def test_a_power_is_expanded_before():
    x = relax.Var("x", relax.TensorType((4, 16), "float16"))
    weight = relax.Var("weight", relax.TensorType((16,), "float16"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, weight]):
        with bb.dataflow():
            wide = bb.emit(R.astype(x, "float32"))
            square = bb.emit(R.power(wide, R.const(2.0, "float32")))
            mean = bb.emit(R.add(bb.emit(R.mean(square, axis=[-1], keepdims=True)), R.const(1e-6, "float32")))
            product = bb.emit(R.multiply(wide, bb.emit(R.rsqrt(mean))))
            out = bb.emit_output(R.multiply(weight, bb.emit(R.astype(product, "float16"))))
        bb.emit_func_output(out)
    assert calls(FuseRMSNorm(TARGET)(ExpandPower()(bb.get()))["main"]) == ["rms_norm"]
