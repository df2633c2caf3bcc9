"""The definition of RMS norms against float64."""

from __future__ import annotations

import numpy as np
import tvm

from rotquant_tvm.ops.model_op import model_op, model_properties
from rotquant_tvm.ops.rms_norm import rms_norm


def test_norms():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 40)).astype("float16"), rng.standard_normal(40).astype("float16")
    func = rms_norm(40, 1e-5, 2)
    tensors = [tvm.runtime.tensor(a) for a in (x, weight, np.full_like(x, np.nan))]
    tvm.compile(tvm.IRModule({"main": func}), "llvm")["main"](*tensors)
    wide = x.astype("float64")
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5) * weight.astype("float64")
    np.testing.assert_allclose(tensors[-1].numpy().astype("float64"), exact, rtol=2e-3, atol=1e-3)
    assert model_op(func) == "rms_norm" and model_properties(func) == {"features": 40, "epsilon": 1e-5, "leading": 2}
